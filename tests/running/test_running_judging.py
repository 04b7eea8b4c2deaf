"""Verdicts at, under and over each limit, and their words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_multigpu.judging.distribution import judge_distribution
from pytest_multigpu.judging.generation import CUDNN_REMEDY, judge_generation
from pytest_multigpu.judging.memory import (
    CONTEXT_BYTES,
    KERNEL_BYTES,
    judge_peaks,
    leak_limit_failures,
    peak_limit_failures,
    with_load,
)
from pytest_multigpu.judging.speed import judge_speed, memory_seconds
from pytest_multigpu.planning.speed import step_seconds
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.generation import Agreement, GenerationReading, Timing
from pytest_multigpu.records.memory import Growth, Leftover
from pytest_multigpu.records.model import DevicePlacement, PeakReading, PhasePeaks, Placement
from pytest_multigpu.records.plan import Architecture, Block, DevicePlan, Peaks, Plan, Tier
from pytest_multigpu.units import GIB, MIB


def architecture(tier: Tier = "16bit") -> Architecture:
    blocks = tuple(
        Block(name=f"model.layers.{i}", kind="layer", layer=i, parameters=100) for i in range(4)
    )
    return Architecture(
        model="m", model_class="M", tier=tier, dtype="bfloat16", blocks=blocks, hidden_size=8,
        intermediate_size=8, layers=4, heads=1, kv_heads=1, head_dim=8, vocab_size=8,
    )  # fmt: skip


def placement(*places: int | str) -> Placement:
    names = [f"cuda:{p}" if isinstance(p, int) else p for p in places]
    return Placement(
        devices=tuple(
            DevicePlacement(
                device=name,
                parameters=100 * names.count(name),
                weights_bytes=200 * names.count(name),
                layers=tuple(i for i, other in enumerate(names) if other == name),
            )
            for name in sorted(set(names))
        ),
        device_map={f"model.layers.{i}": place for i, place in enumerate(places)},
    )


def plan(*places: int | str, devices: tuple[DevicePlan, ...] = ()) -> Plan:
    return Plan(
        architecture=architecture(), weights="synthetic", placement="auto", context_tokens=64,
        batch=1, fits=True, devices=devices,
        device_map={f"model.layers.{i}": place for i, place in enumerate(places)},
    )  # fmt: skip


def by_name(records: list[Record]) -> dict[str, Record]:
    return {record.name: record for record in records}


def test_a_model_as_planned_passes() -> None:
    records = judge_distribution(placement(0, 0, 1, 1), architecture(), plan(0, 0, 1, 1), visible=2)
    assert {record.outcome for record in records} == {"passed"}
    assert records[0].measured == "200 parameters, layers 0-1, 400 B"


def test_offloaded_layers_are_named() -> None:
    record = by_name(
        judge_distribution(
            placement(0, 0, "cpu", "disk"), architecture(), plan(0, 0, "cpu", "disk"), visible=1
        )
    )["nothing offloaded"]
    assert record.outcome == "failed"
    assert record.reason == "not on the GPUs: model.layers.2 on cpu, model.layers.3 on disk"


def test_another_place_than_planned_is_named() -> None:
    record = by_name(
        judge_distribution(placement(0, 1, 1, 1), architecture(), plan(0, 0, 1, 1), visible=2)
    )["placement as planned"]
    assert record.outcome == "failed"
    assert record.reason == "model.layers.1 on GPU 1, planned GPU 0"


@pytest.mark.parametrize(("visible", "outcome"), [(1, "passed"), (2, "warned")])
def test_one_gpu_of_several_is_worth_a_word(visible: int, outcome: str) -> None:
    record = by_name(
        judge_distribution(placement(0, 0, 0, 0), architecture(), plan(0, 0, 0, 0), visible=visible)
    )["spread over GPUs"]
    assert record.outcome == outcome


def test_a_missing_parameter_fails() -> None:
    record = by_name(
        judge_distribution(placement(0, 0, 0), architecture(), plan(0, 0, 0, 0), visible=1)
    )["total parameters"]
    assert (record.outcome, record.reason) == ("failed", "m has 400 parameters, 300 were found")


def timing(step: float, waiting: float = 0.5) -> Timing:
    return Timing(
        prefill_seconds=0.5, decode_seconds=(step,) * 4, waiting_seconds=(step * waiting,) * 4
    )


GOOD = GenerationReading(
    prompt_tokens=10, first_tokens=(1, 2), second_tokens=(1, 2), nonfinite_positions=(),
    positions=11, agreement=Agreement(relative_errors=(0.1, 0.2), clear_tokens=1,
    differing_tokens=0), first=timing(0.1), repeat=timing(0.1), repeat_errors=(0.0, 0.2),
    cudnn_attention=True,
)  # fmt: skip


def test_generation_at_the_limit_passes_and_over_it_fails() -> None:
    assert {r.outcome for r in judge_generation(GOOD, 0.2)} == {"passed"}
    assert by_name(judge_generation(GOOD, 0.19))["cached equals uncached"].reason == (
        "the logits of 1 of 2 tokens differ from an uncached forward by more than 0.19 of their "
        "spread, first at new token 2"
    )


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (
            {"second_tokens": (1, 3)},
            "greedy twice",
            "two greedy generations of the same prompt differ at token 2",
        ),
        (
            {"first_tokens": (), "second_tokens": ()},
            "greedy twice",
            "two greedy generations of the same prompt differ at their length",
        ),
        (
            {"repeat_errors": (0.3, 0.31)},
            "greedy twice",
            "two greedy generations of the same prompt differ: the logits of 1 of 2 tokens by more "
            "than 0.3 of their spread, first at new token 2",
        ),
        (
            {"repeat_errors": (float("nan"), 0.0)},
            "greedy twice",
            "two greedy generations of the same prompt differ: the logits of 1 of 2 tokens by more "
            "than 0.3 of their spread, first at new token 1",
        ),
        ({"nonfinite_positions": (4,)}, "finite logits", "NaN or infinity at 1 positions, first 4"),
        ({"positions": 0}, "finite logits", "no position was looked at"),
        (
            {"agreement": Agreement(relative_errors=(), clear_tokens=0, differing_tokens=0)},
            "cached equals uncached",
            "no token was compared",
        ),
    ],
)
def test_each_fault_has_its_reason(change: dict[str, object], name: str, reason: str) -> None:
    record = by_name(judge_generation(replace(GOOD, **change), 0.3))[name]  # type: ignore[arg-type]
    assert (record.outcome, record.reason) == ("failed", reason)


def test_what_is_not_finite_is_told_once() -> None:
    nan = float("nan")
    reading = replace(GOOD, nonfinite_positions=(9, 10), repeat_errors=(nan, nan))
    records = by_name(judge_generation(reading, 0.3))
    assert records["greedy twice"].outcome == "passed"
    assert records["finite logits"].outcome == "failed"


def test_not_a_number_is_not_agreement() -> None:
    nan = Agreement(relative_errors=(float("nan"),), clear_tokens=0, differing_tokens=0)
    record = by_name(judge_generation(replace(GOOD, agreement=nan), 0.3))["cached equals uncached"]
    assert record.outcome == "failed"


def at_new_lengths(**seconds: float) -> Record:
    timed: dict[str, Any] = {name: timing(value) for name, value in seconds.items()}
    reading = replace(GOOD, **timed)
    return by_name(judge_generation(reading, 0.3))["speed at new lengths"]


def test_the_attention_plan_trap_prints_both_speeds_and_the_remedy() -> None:
    trap = {"first": 0.751, "repeat": 0.072, "new_lengths": 0.215}
    record = at_new_lengths(**trap, without_cudnn=0.073)
    assert record.outcome == "warned"
    assert record.remedy == CUDNN_REMEDY == "torch.backends.cuda.enable_cudnn_sdp(False)"
    assert record.measured == (
        "751.0 ms/token first, 72.0 ms/token repeated, 215.0 ms/token at more new lengths, "
        "73.0 ms/token with cuDNN attention off"
    )
    assert record.reason == (
        "decode is 3.0 times slower at lengths not met before: cuDNN attention plans each length "
        "anew"
    )
    # int8 on two H200s and nf4 on an H100, where bitsandbytes takes most of a step.
    for slow, repeat, without, mended in (
        (0.586, 0.356, 0.444, True),
        (0.132, 0.081, 0.108, True),
        (0.5, 0.25, 0.375, True),
        (0.5, 0.25, 0.376, False),
        (0.5, 0.1, 0.333, True),
        (0.5, 0.1, 0.334, False),
    ):
        found = at_new_lengths(first=1, repeat=repeat, new_lengths=slow, without_cudnn=without)
        assert (found.remedy == CUDNN_REMEDY) is mended
    assert at_new_lengths(**trap, without_cudnn=0.2).reason == (
        "decode is 3.0 times slower at lengths not met before; cuDNN attention is not the cause"
    )
    other = at_new_lengths(**trap)
    assert other.reason == (
        "decode is 3.0 times slower at lengths not met before; the cause is not known"
    )
    assert other.remedy == (
        "look for what compiles or plans for each length, and for other work on these GPUs"
    )


def test_new_lengths_that_were_not_timed_are_no_pass() -> None:
    nothing = Timing(prefill_seconds=1.0, decode_seconds=())
    slow = replace(GOOD, first=timing(0.3), repeat=timing(0.1), new_lengths=nothing)
    record = by_name(judge_generation(slow, 0.3))["speed at new lengths"]
    assert (record.outcome, record.measured) == (
        "warned", "300.0 ms/token first, 100.0 ms/token repeated"
    )  # fmt: skip
    unmended = replace(slow, new_lengths=timing(0.2), without_cudnn=nothing)
    record = by_name(judge_generation(unmended, 0.3))["speed at new lengths"]
    assert record.reason == (
        "decode is 2.0 times slower at lengths not met before; the cause is not known"
    )


def test_what_is_loaded_once_is_no_trap() -> None:
    """A fresh machine: kernels come from a cold disk, and the first pass alone waits for them."""
    once = at_new_lengths(first=0.712, repeat=0.064, new_lengths=0.096)
    assert (once.outcome, once.reason) == ("passed", "only the first pass was slower")
    assert once.measured == (
        "712.0 ms/token first, 64.0 ms/token repeated, 96.0 ms/token at more new lengths"
    )
    assert at_new_lengths(first=0.712, repeat=0.064, new_lengths=0.097).outcome == "warned"
    plain = at_new_lengths(first=0.096, repeat=0.064)
    assert (plain.outcome, plain.reason) == ("passed", "")
    assert plain.measured == "96.0 ms/token first, 64.0 ms/token repeated"
    assert plain.expected == "at most 1.5 times the repeat"


def test_floor_of_a_70b_on_h100s() -> None:
    whole = Placement(
        devices=tuple(
            DevicePlacement(device=f"cuda:{i}", parameters=1, weights_bytes=141_107_412_992 // 4)
            for i in range(4)
        ),
        device_map={},
    )
    fast = {f"cuda:{i}": 3.35e12 for i in range(4)}
    floor = memory_seconds(whole, fast, architecture())
    assert floor is not None
    assert 1 / floor == pytest.approx(23.7, abs=0.1)
    assert memory_seconds(whole, {"cuda:0": 3.35e12}, architecture()) is None


def test_the_floor_leaves_out_what_a_step_does_not_read() -> None:
    """Embeddings on the first GPU, all but a quarter of the experts on the second."""
    blocks = (
        Block(name="model.embed_tokens", kind="embedding", weights_bytes=50),
        Block(name="model.layers.0", kind="layer", layer=0, weights_bytes=150),
        Block(
            name="model.layers.1", kind="layer", layer=1, weights_bytes=200, routed_bytes=160,
            routed_share=0.25,
        ),
    )  # fmt: skip
    where = Placement(
        devices=placement(0, 1).devices,
        device_map={"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1},
    )
    model, speeds = replace(architecture(), blocks=blocks), {"cuda:0": 100.0, "cuda:1": 10.0}
    assert memory_seconds(where, speeds, model) == pytest.approx(1.5 + 8.0)
    assert memory_seconds(where, speeds, model, copies=True) == pytest.approx(1.5 + 16.0)
    # What lies on both is taken as read.
    split = replace(where, device_map={**where.device_map, "model.layers.1": "cpu"})
    assert memory_seconds(split, speeds, model) == pytest.approx(1.5 + 20.0)


def test_speed_tells_the_causes_apart() -> None:
    here, fast = placement(0, 1, 1, 1), {"cuda:0": 1e4, "cuda:1": 1e4}

    def decode(reading: GenerationReading, where: Placement = here, **more: list[str]) -> Record:
        return by_name(judge_speed(reading, where, fast, architecture(), **more))["decode speed"]

    bound = replace(GOOD, repeat=timing(0.1, waiting=0.05))
    assert (decode(GOOD).outcome, decode(GOOD).reason, decode(GOOD).measured) == ("passed", "", 10)
    assert decode(bound).reason == "CPU-bound: the GPUs keep up with Python for 95% of a step"
    assert decode(bound, throttled=["GPU 1"]).reason == "throttled: GPU 1"
    assert decode(GOOD, slow_links=["GPU 0 -> GPU 1"]).reason == "slow link: GPU 0 -> GPU 1"
    offloaded = decode(GOOD, placement(0, 0, 0, "cpu"))
    assert offloaded.outcome == "warned"
    floor = by_name(judge_speed(GOOD, here, fast, architecture()))[
        "decode beside the bandwidth floor"
    ]
    assert floor.measured == "10.0 tokens/s, 80% of it"
    unknown = by_name(judge_speed(GOOD, here, {}, architecture()))[
        "decode beside the bandwidth floor"
    ]
    assert unknown.outcome == "unknown"


def test_decode_beside_what_the_software_stack_needs() -> None:
    here, fast = placement(0, 0, 0, 0), {"cuda:0": 1e12}
    name = "decode beside this software stack"
    expected = step_seconds(architecture(), 0.0, gpus=1, launch_seconds=15e-6)
    assert expected == pytest.approx(2 * (3.3e-3 + 4 * 40 * 25e-6))  # half as fast a CPU

    def judged(step: float, **more: list[str]) -> Record:
        reading = replace(GOOD, repeat=timing(step), launch_seconds=15e-6)
        return by_name(judge_speed(reading, here, fast, architecture(), **more))[name]

    at = judged(1.5 * expected)
    assert (at.outcome, at.reason, at.remedy) == ("passed", "", "")
    assert at.expected == "about 68.5 tokens/s at 15.0 us a kernel launch"
    assert at.measured == "45.7 tokens/s"
    over = judged(1.51 * expected)
    assert over.outcome == "warned"
    assert over.reason == "a step takes 1.5 times what transformers should need here"
    assert over.remedy == "look for other processes on these CPU cores (top) and GPUs (nvidia-smi)"
    known = judged(2 * expected, throttled=["GPU 0 (hardware thermal slowdown)"])
    assert known.reason == (
        "a step takes 2.0 times what transformers should need here: "
        "throttled: GPU 0 (hardware thermal slowdown)"
    )
    assert known.remedy == ""
    not_timed = judge_speed(GOOD, here, fast, architecture())
    assert name not in by_name(not_timed)


def peaks(used: int | None, allocated: int = 0, reserved: int = 0, phase: str = "decode"):  # type: ignore[no-untyped-def]  # noqa: ANN201
    return PhasePeaks(
        phase=phase,
        readings=(
            PeakReading(
                device="cuda:1", allocated_bytes=allocated, reserved_bytes=reserved, used_bytes=used
            ),
        ),
    )


def grown(torch: int | None, nvml: int | None, **more: Any) -> Growth:
    values: dict[str, Any] = {"live_bytes": 0, "had_context": True} | more
    return Growth(device="cuda:1", torch_bytes=torch, grown_bytes=nvml, **values)


def test_peak_limit_of_torchs_tensors_at_and_over() -> None:
    limit = 36 * GIB
    assert peak_limit_failures([grown(limit, 0)], limit) == []
    assert peak_limit_failures([grown(limit + 1, 0)], limit) == [
        "GPU 1 peaked at 38,654,705,665 B; gpu_peak_limit is 38,654,705,664 B"
    ]
    assert peak_limit_failures([grown(round(37.2 * GIB), 0)], limit) == [
        "GPU 1 peaked at 37.2 GiB; gpu_peak_limit is 36.0 GiB"
    ]


def test_peak_limit_of_what_torch_does_not_know() -> None:
    limit = 36 * GIB
    assert peak_limit_failures([grown(0, limit)], limit) == []
    assert peak_limit_failures([grown(0, limit - GIB, live_bytes=GIB)], limit) == []
    assert peak_limit_failures([grown(2 * MIB, limit + GIB)], limit) == [
        "GPU 1 peaked at 37.0 GiB by NVML, 37.0 GiB more than before the test; gpu_peak_limit is "
        "36.0 GiB; torch's tensors had 2.0 MiB"
    ]
    assert peak_limit_failures([grown(31 * GIB, 10 * GIB, live_bytes=30 * GIB)], limit) == [
        "GPU 1 peaked at 40.0 GiB by NVML, 10.0 GiB more than before the test and 30.0 GiB in "
        "tensors before; gpu_peak_limit is 36.0 GiB; torch's tensors had 31.0 GiB"
    ]
    hidden = grown(0, 37 * GIB, hidden_bytes=256 * MIB + 1)
    (line,) = peak_limit_failures([hidden], limit)
    assert line.endswith(
        "torch's tensors had 0 B, and NVML shows not whose the rest is: others may have come "
        "meanwhile"
    )
    assert peak_limit_failures([replace(hidden, hidden_bytes=256 * MIB)], limit) != [line]


def test_a_context_that_the_test_made_is_not_its_peak() -> None:
    fresh = grown(0, GIB + CONTEXT_BYTES, had_context=False)
    assert peak_limit_failures([fresh], GIB) == []
    assert len(peak_limit_failures([replace(fresh, had_context=True)], GIB)) == 1
    assert (
        len(peak_limit_failures([grown(0, GIB + CONTEXT_BYTES + 1, had_context=False)], GIB)) == 1
    )


@pytest.mark.parametrize(
    ("torch", "nvml", "why"),
    [
        (None, None, "torch cannot use it"),
        (None, 0, "torch cannot use it"),
        (0, None, "NVML gave no reading"),
    ],
)
def test_a_peak_that_was_not_measured_is_over_the_limit(
    torch: int | None, nvml: int | None, why: str
) -> None:
    assert peak_limit_failures([grown(torch, nvml)], 36 * GIB) == [
        f"GPU 1 was not measured: {why}; gpu_peak_limit is 36.0 GiB"
    ]


LEFT = Leftover(
    device="cuda:0",
    before_bytes=5,
    after_bytes=5 + 64 * MIB,
    used_before_bytes=GIB,
    used_after_bytes=GIB,
)


def test_leak_limit_of_torchs_tensors_at_and_over() -> None:
    assert leak_limit_failures([LEFT], 64 * MIB) == []
    more = replace(LEFT, after_bytes=5 + 80 * MIB, used_after_bytes=GIB + 82 * MIB)
    assert leak_limit_failures([more], 64 * MIB) == [
        "GPU 0 was left with 80.0 MiB more than before; gpu_leak_limit is 64.0 MiB "
        "(NVML: 82.0 MiB more in use)"
    ]
    less = replace(more, used_after_bytes=GIB - 1)
    assert leak_limit_failures([less], 64 * MIB) == [
        "GPU 0 was left with 80.0 MiB more than before; gpu_leak_limit is 64.0 MiB"
    ]


def test_leak_limit_of_what_torch_does_not_know() -> None:
    room = 64 * MIB + KERNEL_BYTES
    at = replace(LEFT, after_bytes=5, used_after_bytes=GIB + room)
    assert leak_limit_failures([at], 64 * MIB) == []
    over = replace(at, used_after_bytes=GIB + 3 * GIB)
    assert leak_limit_failures([over], 64 * MIB) == [
        "GPU 0 was left with 3.0 GiB more in use by NVML than before, 0 B of it in torch's "
        "tensors; gpu_leak_limit is 64.0 MiB, and 256.0 MiB are left to CUDA itself"
    ]
    assert len(leak_limit_failures([replace(at, used_after_bytes=GIB + room + 1)], 64 * MIB)) == 1
    # A context that the test made stays, and is no leak.
    fresh = replace(at, used_after_bytes=GIB + room + CONTEXT_BYTES, had_context=False)
    assert leak_limit_failures([fresh], 64 * MIB) == []
    assert len(leak_limit_failures([replace(fresh, had_context=True)], 64 * MIB)) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"by_torch": False}, "torch cannot use it"),
        ({"used_before_bytes": None}, "NVML gave no reading"),
        ({"used_after_bytes": None}, "NVML gave no reading"),
    ],
)
def test_a_leftover_that_was_not_measured_is_over_the_limit(
    change: dict[str, Any], why: str
) -> None:
    assert leak_limit_failures([replace(LEFT, **change)], GIB) == [
        f"GPU 0 was not measured: {why}; gpu_leak_limit is 1.0 GiB"
    ]


GPU1 = DevicePlan(
    device="cuda:1", layers=(0, 3), weights_bytes=1, kv_bytes=0, activation_bytes=0,
    reserve_bytes=0, peak_bytes=10 * GIB, limit_bytes=20 * GIB, peaks=Peaks(decode_bytes=10 * GIB),
)  # fmt: skip


@pytest.mark.parametrize(
    ("used", "outcome"),
    [
        (None, "unknown"),
        (10 * GIB + 256 * MIB, "passed"),
        (10 * GIB - 256 * MIB, "passed"),
        (10 * GIB + 256 * MIB + 1, "warned"),
        (20 * GIB, "warned"),
        (20 * GIB + 1, "failed"),
    ],
)
def test_peaks_beside_prediction_and_limit(used: int | None, outcome: str) -> None:
    (record,) = judge_peaks([peaks(used)], plan(devices=(GPU1,)))
    assert record.outcome == outcome


def test_other_processes_are_not_ours() -> None:
    (record,) = judge_peaks([peaks(15 * GIB)], plan(devices=(GPU1,)), others={"cuda:1": 5 * GIB})
    assert (record.outcome, record.measured) == ("passed", 10 * GIB)


def test_a_gpu_without_a_reading_is_unknown_and_so_is_nothing_at_all() -> None:
    (record,) = judge_peaks([PhasePeaks(phase="decode")], plan(devices=(GPU1,)))
    assert record.outcome == "unknown"
    assert judge_peaks([], plan(devices=(GPU1,)))[0].outcome == "unknown"


def test_load_is_shown_as_nvml_would() -> None:
    load = with_load(peaks(None, 2, 10, phase="load"), [peaks(9, 0, 4), peaks(8, 0, 5)])
    assert load.readings[0].used_bytes == 13
