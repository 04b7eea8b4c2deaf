"""The terminal's lines, word for word."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_examples import check, copies, few_gpus, four_h100s, free_vram, machine, plan, speed

from pytest_multigpu.judging.verdict import decide
from pytest_multigpu.records.check import Record, Value
from pytest_multigpu.records.plan import Parts
from pytest_multigpu.records.report import CheckResult, RunReport
from pytest_multigpu.report.plan import plan_lines
from pytest_multigpu.report.tables import (
    Line,
    block_list,
    copy_matrices,
    gpu_table,
    table_lines,
)
from pytest_multigpu.report.terminal import check_lines, summary_lines
from pytest_multigpu.report.words import (
    columns,
    layers_text,
    number,
    pair_of,
    shown_device,
    value_text,
)
from pytest_multigpu.units import GIB


def text(lines: list[Line]) -> str:
    return "\n".join(line.text for line in lines)


def finished(*checks: CheckResult) -> RunReport:
    report = four_h100s(*checks)
    return replace(report, verdict=decide(report))


DEFAULT = """\
GPU    name                   layers  weights   KV  predicted  measured  limit
GPU 0  NVIDIA H100 80GB HBM3  0-18       32.2  0.1       33.8      36.3   78.7  GiB
GPU 1  NVIDIA H100 80GB HBM3  19-39      33.5  0.2       35.0      36.4   78.7  GiB
GPU 2  NVIDIA H100 80GB HBM3  40-60      33.5  0.2       35.0      36.5   78.7  GiB
GPU 3  NVIDIA H100 80GB HBM3  61-79      32.2  0.1       33.8      36.6   78.7  GiB

model llama-3.3-70b, 16bit (bfloat16), 131.4 GiB of weights (synthetic), placement auto, \
context 2048 tokens x 1
loaded 131.4 GiB (synthetic) in 0.7 s, 190.7 GB/s by transformers

passed   free VRAM     4 GPUs          at least 36.0 GiB     78.7 GiB to 79.6 GiB
passed   copy speed    11 pairs        at least 20 GB/s      151.0 to 182.0 GB/s
FAILED   copy speed    GPU 0 -> GPU 2  at least 20 GB/s      7.50 GB/s
         GPU 0 -> GPU 2 is slow; rent a machine with NVLink
warned   decode speed                  at least 12 tokens/s  10.0 tokens/s
         decoding is slower than half the bandwidth floor; \
torch.backends.cuda.enable_cudnn_sdp(False)
FAILED   GPUs                          2 GPUs                1 GPU
         needs 2 GPUs with 40.0 GiB free each; found 1 (GPU 0: 79.2 GiB free); rent 2 or more

NOT READY: GPU 0 -> GPU 2 is slow; rent a machine with NVLink (+1 more)"""


def test_default() -> None:
    report = finished(free_vram(), copies(broken=(0, 2)), speed(), few_gpus())
    assert text(summary_lines(report)) == DEFAULT


def test_quiet_is_one_line_verbose_adds_tables_and_the_verdict_is_last() -> None:
    report = finished()
    assert report.verdict is not None
    last = Line(report.verdict.line, ("green", "bold"))
    assert summary_lines(report, verbosity=-1) == [last]
    usual, verbose = summary_lines(report), summary_lines(report, verbosity=1)
    assert usual[-1] == verbose[-1] == last
    assert "peak of  GPU    allocated  reserved  in use  predicted" in text(verbose)
    assert "peak of" not in text(usual)
    assert "decode   GPU 3       34.2      35.2    36.5       33.5  GiB" in text(verbose)
    # The plan has no probe phase: no number of its own, not 0.0.
    assert "probe    GPU 3       34.1      35.1    36.4          -  GiB" in text(verbose)


def test_an_unfinished_run_has_no_verdict_line() -> None:
    assert summary_lines(four_h100s(), verbosity=-1) == []


def test_kwargs_are_pytests_markup() -> None:
    assert Line("x", ("red", "bold")).kwargs == {"red": True, "bold": True}


def test_matrix_of_eight_gpus_fits_eighty_columns() -> None:
    lines = text(copy_matrices([copies(8, broken=(0, 1))])).splitlines()
    assert lines[0] == "copy speed (GB/s), ! = not passed"
    assert lines[1] == "from \\ to  GPU 0  GPU 1  GPU 2  GPU 3  GPU 4  GPU 5  GPU 6  GPU 7"
    assert lines[2] == "GPU 0          -  7.5 !    152    153    154    155    156    157"
    assert lines[9] == "GPU 7        220    221    222    223    224    225    226      -"
    assert len(lines) == 10
    # Under -v the pairs are in the matrix, not in 56 lines.
    assert len(check_lines([copies(8)], verbose=True)) == 1
    assert copy_matrices([copies(2)]) == []


def test_gpus_that_are_hidden_broken_or_over_their_limit_stay_rows() -> None:
    found = machine(3)
    gpus = (
        replace(found.gpus[0], problem="GPU is lost"),
        found.gpus[1],
        replace(found.gpus[2], cuda_index=None),
    )
    over = replace(plan().devices[1], peak_bytes=80 * GIB, limit_bytes=78 * GIB)
    cpu = replace(over, device="cpu", limit_bytes=0, layers=(76, 79))
    disk = replace(cpu, device="disk", weights_bytes=0)
    report = RunReport(
        machine=replace(found, gpus=gpus, visible=(0, 1)),
        plan=replace(plan(), devices=(over, cpu, disk)),
    )
    lines = gpu_table(report)
    assert text(lines) == (
        "GPU     name                   layers  weights   KV  predicted  measured  limit\n"
        "GPU 0   NVIDIA H100 80GB HBM3  -             -    -          -         -   78.7  "
        "GPU is lost\n"
        "GPU 1   NVIDIA H100 80GB HBM3  19-39      33.5  0.2       80.0         -   78.0  "
        "GiB, 2.0 GiB over\n"
        "cpu                            76-79      33.5  0.2       80.0         -      -  GiB\n"
        "NVML 2  NVIDIA H100 80GB HBM3  -             -    -          -         -      -  "
        "hidden by CUDA_VISIBLE_DEVICES"
    )
    assert [line.markup for line in lines] == [("bold",), ("red",), ("red",), ("yellow",), ()]


def test_no_gpu_no_table_and_a_broken_detection_is_said() -> None:
    report = RunReport(machine=replace(machine(0), problem="NVML does not answer: Timeout"))
    assert gpu_table(report) == []
    assert text(summary_lines(report)) == "NVML does not answer: Timeout\n"


def test_skips_and_crashes_are_lines_with_their_reason() -> None:
    skipped = CheckResult(nodeid="t.py::test_s", outcome="skipped", reason="needs NVLink")
    crashed = CheckResult(
        nodeid="t.py::test_c",
        outcome="error",
        reason="OSError: x",
        records=(Record(name="a", outcome="passed"),),
    )
    own = CheckResult(nodeid="t.py::test_o", outcome="passed", is_check=False)
    assert text(check_lines([skipped, crashed, own])) == (
        "skipped  test_s\n         needs NVLink\npassed   a         -  -\n"
        "ERROR    test_c\n         OSError: x"
    )


def test_the_allocator_stands_beside_the_context() -> None:
    report = finished()
    assert report.machine is not None
    grows = replace(report, machine=replace(report.machine, expandable_segments=True))
    assert "context 2048 tokens x 1\n" in text(summary_lines(report))
    assert "context 2048 tokens x 1, expandable segments\n" in text(summary_lines(grows))


def test_skips_for_one_reason_share_a_line() -> None:
    skips = [
        CheckResult(nodeid=f"t.py::test_{i}", outcome="skipped", reason="no GPU" if i else "other")
        for i in range(4)
    ]
    assert text(check_lines(skips)) == (
        "skipped  test_0\n         other\nskipped  3 tests\n         no GPU"
    )
    assert len(check_lines(skips, verbose=True)) == 8


def test_plan() -> None:
    assert text(plan_lines(plan())) == (
        "llama-3.3-70b in 16bit (bfloat16): 131.4 GiB of weights, placement auto, "
        "context 2048 tokens x 1\n\n"
        "device  layers  weights   KV  activations  reserve  peak  limit\n"
        "GPU 0   0-18       32.2  0.1          0.5      0.9  33.8   78.7  GiB, 44.9 GiB left\n"
        "GPU 1   19-39      33.5  0.2          0.5      0.9  35.0   78.7  GiB, 43.7 GiB left\n"
        "GPU 2   40-60      33.5  0.2          0.5      0.9  35.0   78.7  GiB, 43.7 GiB left\n"
        "GPU 3   61-79      32.2  0.1          0.5      0.9  33.8   78.7  GiB, 44.9 GiB left\n"
        "\nthe plan fits"
    )


def test_what_a_tier_leaves_in_16_bit() -> None:
    def first(share: float) -> str:
        model = plan().architecture
        kept = tuple(
            replace(block, unquantised_bytes=int(block.weights_bytes * share))
            for block in model.blocks
        )
        return plan_lines(replace(plan(), architecture=replace(model, blocks=kept)))[0].text

    assert first(0.9) == (
        "llama-3.3-70b in 16bit (bfloat16): 131.4 GiB of weights (118.3 GiB of them stay in 16 "
        "bit: bitsandbytes takes plain Linears only), placement auto, context 2048 tokens x 1"
    )
    assert "stay" not in first(0.04)


def test_a_plan_that_does_not_fit() -> None:
    devices = list(plan().devices)
    devices[0] = replace(devices[0], limit_bytes=devices[0].peak_bytes - GIB)
    lines = plan_lines(
        replace(
            plan(),
            fits=False,
            devices=tuple(devices),
            reasons=("GPU 0 lacks 1.0 GiB",),
            remedies=("use --gpu-tier=8bit",),
            offloaded=("model.layers.78", "model.layers.79", "lm_head"),
        )
    )
    assert "33.8   32.8  GiB, lacks 1.0 GiB" in lines[3].text
    assert text(lines[-4:]) == (
        "off the GPUs: model.layers.78 to 79 (2 blocks), lm_head\n"
        "GPU 0 lacks 1.0 GiB\nremedy: use --gpu-tier=8bit\nthe plan does not fit"
    )


def test_a_plan_without_a_gpu_has_no_table() -> None:
    nowhere = replace(plan(), devices=(), offloaded=(), fits=False, reasons=("no GPU",))
    head, *others = [line.text for line in plan_lines(nowhere)]
    assert head.startswith("llama-3.3-70b in 16bit")
    assert others == ["", "no GPU", "the plan does not fit"]


def test_what_a_plan_that_fits_warns_of() -> None:
    lines = plan_lines(replace(plan(), warnings=("16bit fits as well",)))
    assert [line.text for line in lines[-2:]] == ["warning: 16bit fits as well", "the plan fits"]
    assert lines[-2].markup == ("yellow",)


def test_the_max_memory_is_a_line_to_paste() -> None:
    lines = plan_lines(replace(plan(), max_memory={0: "35GiB", 1: "33GiB"}))
    assert text(lines[-2:]) == (
        'auto places it like this with from_pretrained(..., device_map="auto", '
        'max_memory={0: "35GiB", 1: "33GiB"})\nthe plan fits'
    )
    refused = plan_lines(replace(plan(), fits=False, max_memory={0: "35GiB"}))
    assert not [line for line in refused if "like this" in line.text]


def test_verbose_plans_have_each_peak_in_parts() -> None:
    found = plan()
    parts = Parts(
        context_bytes=GIB,
        weights_bytes=32 * GIB,
        kv_bytes=GIB // 2,
        activations_bytes=GIB // 4,
        logits_bytes=GIB // 8,
        workspace_bytes=GIB // 16,
        transient_bytes=3 * GIB,
        slack_bytes=2 * GIB,
    )
    first = replace(found.devices[0], parts={"load": Parts(slack_bytes=GIB), "prefill": parts})
    found = replace(found, devices=(first, *found.devices[1:]))
    lines = plan_lines(found, verbosity=1)
    assert text(lines[8:11]) == (
        "device  peak of  context  weights    KV  activations  logits  workspace  transient  slack"
        "  in all\n"
        "GPU 0   load        0.00     0.00  0.00         0.00    0.00       0.00       0.00   1.00"
        "    1.00  GiB\n"
        "GPU 0   prefill     1.00    32.00  0.50         0.25    0.12       0.06       3.00   2.00"
        "   38.94  GiB"
    )
    assert len(plan_lines(found)) == len(lines) - 4
    assert text(plan_lines(plan(), verbosity=1)) == text(plan_lines(plan()))


def test_table_lines() -> None:
    lines = table_lines(("GPU", "price"), [("4 x A6000", "1.96"), ("H200", "3")], right=(1,))
    assert text(lines) == "GPU        price\n4 x A6000   1.96\nH200           3"
    assert columns([]) == []


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ((), ""),
        (("lm_head",), "lm_head"),
        (("m.layers.3",), "m.layers.3"),
        (("m.layers.3", "m.layers.4", "m.layers.6"), "m.layers.3 to 4 (2 blocks), m.layers.6"),
        (("a.1", "b.2"), "a.1, b.2"),
    ],
)
def test_block_list(names: tuple[str, ...], shown: str) -> None:
    assert block_list(names) == shown


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "bytes", "-"),
        (True, "", "yes"),
        (False, "", "no"),
        (3, "GPUs", "3 GPUs"),
        (1, "GPUs", "1 GPU"),
        (1, "s", "1 s"),
        (1, "GB/s", "1 GB/s"),
        (42949672960, "bytes", "40.0 GiB"),
        (4096.0, "bytes", "4096 B"),
        (float("nan"), "bytes", "nan bytes"),
        (float("inf"), "GB/s", "inf GB/s"),
        (0.0000013, "", "1.3e-06"),
        (148.24, "GB/s", "148.2 GB/s"),
        ("at least 42949672960", "bytes", "at least 40.0 GiB"),
        ("at least 12.5", "tokens/s", "at least 12.5 tokens/s"),
        ("equal", "bytes", "equal"),
        ("layer 22", "", "layer 22"),
        ("12", "s", "12 s"),
    ],
)
def test_value_text(value: Value, unit: str, shown: str) -> None:
    assert value_text(value, unit) == shown


def test_small_words() -> None:
    assert shown_device("cuda:0 -> cuda:11") == "GPU 0 -> GPU 11"
    assert shown_device("cpu") == "cpu"
    assert pair_of("cuda:0 -> cuda:1") == ("GPU 0", "GPU 1")
    assert pair_of("cuda:0 -> cuda:1 -> cuda:2") is None
    assert pair_of("cuda:0") is None
    assert layers_text((3, 3)) == "3"
    assert layers_text(None) == "-"
    assert number(7) == "7"
    assert number(9.999) == "10.00"


def test_devices_of_a_group() -> None:
    chain = [
        Record(name="chain", outcome="passed", device=f"cuda:0 -> cuda:1 -> cuda:{i}")
        for i in (2, 3)
    ]
    lines = text(check_lines([check("c", *chain)]))
    assert lines.startswith("passed   chain  2 chains")
    mixed = [Record(name="m", outcome="passed", measured=v, device=f"cuda:{v}") for v in ("a", "b")]
    assert "various" in text(check_lines([check("c", *mixed)]))
