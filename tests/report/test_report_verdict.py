"""READY or NOT READY: exit codes, the one line, worst first."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from report_examples import copies, few_gpus, four_h100s, free_vram, machine, plan, speed

from pytest_multigpu.judging.verdict import decide, sentence
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.report import CheckResult, RunReport

GOOD = Record(name="free VRAM", outcome="passed")
SHORT = "needs 2 GPUs with 40.0 GiB free each; found 1 (GPU 0: 79.2 GiB free); rent 2 or more"


def result(
    outcome: Literal["passed", "failed", "skipped", "error"] = "passed",
    *records: Record,
    reason: str = "",
    is_check: bool = True,
    hardware_skip: bool = False,
    shortfall: bool = False,
) -> CheckResult:
    return CheckResult(
        nodeid="test_x.py::test_x",
        outcome=outcome,
        records=records,
        reason=reason,
        is_check=is_check,
        hardware_skip=hardware_skip,
        shortfall=shortfall,
    )


def run(*checks: CheckResult) -> RunReport:
    return RunReport(checks=checks)


def test_ready_names_model_tier_machine_and_counts() -> None:
    verdict = decide(four_h100s())
    assert verdict.ready
    assert verdict.exit_code == 0
    assert verdict.reasons == ()
    assert verdict.line == (
        "READY: llama-3.3-70b in 16bit on 4 x NVIDIA H100 80GB HBM3: 3 checks passed, 1 warning"
    )


def test_ready_counts_skips_unknown_and_own_tests() -> None:
    report = run(
        result("passed", GOOD, Record(name="ECC", outcome="unknown", reason="N/A")),
        result("skipped", reason="needs NVLink; found none", hardware_skip=True),
        result("passed", is_check=False),
    )
    assert decide(report).line == (
        "READY: 1 check passed, 1 own test passed, 1 unknown, 1 skipped (no model was loaded)"
    )


def test_cpu_tier_says_that_no_gpu_was_checked() -> None:
    report = replace(four_h100s(), tier="cpu")
    assert decide(report).line == (
        "READY: 3 checks passed, 1 warning (cpu tier: no GPU was checked)"
    )


def test_simulated_says_plan_only() -> None:
    report = replace(
        four_h100s(free_vram()),
        load=None,
        machine=replace(machine(2, name="A6000"), simulated="2xA6000"),
    )
    assert decide(report).line == (
        "READY: llama-3.3-70b in 16bit on 2 x A6000: 1 check passed (simulated 2xA6000: plan only)"
    )


def test_shortfall_alone_exits_10() -> None:
    verdict = decide(four_h100s(free_vram(), few_gpus()))
    assert verdict.exit_code == 10
    assert not verdict.ready
    assert verdict.line == f"NOT READY: {SHORT}"
    assert verdict.reasons == (SHORT,)


def test_shortfall_beside_a_failure_exits_1_and_the_failure_comes_first() -> None:
    verdict = decide(four_h100s(few_gpus(), copies(broken=(0, 2))))
    assert verdict.exit_code == 1
    assert verdict.line == (
        "NOT READY: GPU 0 -> GPU 2 is slow; rent a machine with NVLink (+1 more)"
    )
    assert verdict.reasons[1] == SHORT


def test_a_crash_is_a_failure_and_never_a_shortfall() -> None:
    verdict = decide(run(few_gpus(), result("error", reason="RuntimeError: CUDA error")))
    assert verdict.exit_code == 1
    assert verdict.reasons[0] == "test_x.py::test_x failed: RuntimeError: CUDA error"


def test_a_crash_after_a_shortfall_record_in_the_same_test_exits_1() -> None:
    short = few_gpus().records
    assert decide(run(result("failed", *short, reason="ValueError: x"))).exit_code == 1


def test_own_failed_test_without_text() -> None:
    verdict = decide(run(result("passed", GOOD), result("failed", is_check=False)))
    assert (verdict.exit_code, verdict.line) == (1, "NOT READY: test_x.py::test_x failed")


def test_demanded_hardware_without_records_is_a_shortfall() -> None:
    verdict = decide(run(result("failed", reason="needs 4 GPUs; found no GPU", shortfall=True)))
    assert (verdict.exit_code, verdict.line) == (10, "NOT READY: needs 4 GPUs; found no GPU")


def test_a_failed_record_cannot_hide_in_a_passed_test() -> None:
    bad = Record(name="copies", outcome="failed", expected="equal", measured="zeros")
    verdict = decide(run(result("passed", bad)))
    assert verdict.exit_code == 1
    assert verdict.line == "NOT READY: copies: expected equal, measured zeros"


@pytest.mark.parametrize(("strict", "code"), [(False, 0), (True, 1)])
def test_no_check_executed(strict: bool, code: int) -> None:
    verdict = decide(run(result("skipped", reason="simulated")), strict=strict)
    assert (verdict.ready, verdict.checked, verdict.exit_code) == (False, True, code)
    assert verdict.line == "NOT READY: no check was executed (1 skipped)"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("outcome", ["passed", "skipped"])
def test_a_check_that_could_measure_nothing_and_nothing_else(
    strict: bool, outcome: Literal["passed", "skipped"]
) -> None:
    unknown = result(outcome, Record(name="x", outcome="unknown", reason="N/A", remedy="look"))
    verdict = decide(run(unknown), strict=strict)
    assert (verdict.ready, verdict.exit_code, verdict.line) == (False, 1, "NOT READY: N/A; look")


def test_unmeasured_checks_are_counted_as_such() -> None:
    unknown = Record(name="x", outcome="unknown", reason="N/A")
    report = run(
        result("passed", GOOD), result("skipped", unknown), result("skipped", reason="simulated")
    )
    assert decide(report).line == (
        "READY: 1 check passed, 1 unmeasured, 1 skipped (no model was loaded)"
    )


def test_ready_rests_on_what_is_essential() -> None:
    unknown = Record(name="copies", outcome="unknown", reason="no room", essential=True)
    for outcome in ("passed", "failed", "skipped"):
        verdict = decide(run(result("passed", GOOD), result(outcome, GOOD, unknown)))
        assert (verdict.exit_code, verdict.reasons) == (1, ("no room",))


def test_an_expected_skip_may_be_unmeasured() -> None:
    unknown = Record(name="copies", outcome="unknown", reason="no room", essential=True)
    skip = replace(result("skipped", unknown), expected_skip=True)
    assert decide(run(result("passed", GOOD), skip)).ready


OWN = CheckResult(nodeid="test_own.py::test_x", outcome="passed", is_check=False)


def test_a_run_of_own_tests_alone_claims_nothing() -> None:
    skipped = replace(OWN, outcome="skipped", hardware_skip=True, reason="needs 2 GPUs")
    verdict = decide(replace(run(OWN, OWN, skipped), machine=Machine()))
    assert (verdict.ready, verdict.checked, verdict.exit_code) == (False, False, 0)
    assert verdict.line == "NOT CHECKED: 2 own tests passed, 1 skipped, no shipped check ran"
    assert decide(run()).line == "NOT CHECKED: no shipped check ran"
    strict = decide(run(OWN), strict=True)
    assert (strict.exit_code, strict.checked) == (1, True)
    assert strict.line == "NOT READY: no check was executed (1 own test passed)"
    failed = decide(run(OWN, replace(OWN, outcome="failed")))
    assert (failed.exit_code, failed.line) == (1, "NOT READY: test_own.py::test_x failed")


@pytest.mark.parametrize(
    ("found", "code", "reason"),
    [
        (Machine(), 10, "this machine has no NVIDIA GPU; rent a machine with GPUs"),
        (Machine(problem="NVML hangs"), 1, "the GPUs could not be asked: NVML hangs"),
        (
            replace(machine(2), visible=(), visible_env="-1"),
            1,
            "CUDA_VISIBLE_DEVICES='-1' hides all 2 GPUs",
        ),
        (
            replace(machine(1), visible=(), visible_env=""),
            1,
            "CUDA_VISIBLE_DEVICES='' hides all 1 GPU",
        ),
    ],
)
def test_gpus_that_are_not_there_whichever_checks_ran(
    found: Machine, code: int, reason: str
) -> None:
    report = replace(run(result("passed", GOOD)), machine=found)
    verdict = decide(report)
    assert (verdict.ready, verdict.exit_code, verdict.reasons) == (False, code, (reason,))
    # No GPU is checked in the cpu tier, nor on a machine that isn't there.
    assert decide(replace(report, tier="cpu")).ready
    assert decide(replace(report, machine=replace(found, simulated="2xA6000"))).ready
    # Nor by people's own tests.
    assert decide(replace(report, checks=(OWN,))).exit_code == 0


def test_a_gpu_that_cannot_be_read_whichever_checks_ran() -> None:
    lost = machine(2)
    gone = replace(lost.gpus[1], problem="GPU 1 cannot be read: GPU is lost")
    report = replace(run(result("passed", GOOD)), machine=replace(lost, gpus=(lost.gpus[0], gone)))
    assert decide(report).line == "NOT READY: GPU 1 cannot be read: GPU is lost"
    hidden = replace(lost, gpus=(lost.gpus[0], gone), visible=(0,))
    assert decide(replace(report, machine=hidden)).ready


@pytest.mark.parametrize(("mendable", "code"), [(False, 10), (True, 1)])
def test_a_plan_that_does_not_fit_whichever_checks_ran(mendable: bool, code: int) -> None:
    unfit = replace(
        plan(), fits=False, reasons=("GPU 0 lacks 3.0 GiB",), remedies=("rent",), mendable=mendable
    )
    report = replace(four_h100s(free_vram()), plan=unfit, load=None)
    verdict = decide(report)
    assert (verdict.exit_code, verdict.line) == (code, "NOT READY: GPU 0 lacks 3.0 GiB; rent")
    assert decide(replace(report, checks=(OWN,))).exit_code == 0


def test_a_plan_that_could_not_be_made_is_no_plan_that_fits() -> None:
    report = replace(four_h100s(free_vram()), plan=None, unsettled="no planner")
    verdict = decide(report)
    assert (verdict.exit_code, verdict.line) == (1, "NOT READY: no plan could be made: no planner")


def test_the_machine_is_told_once_and_turns_a_shortfall_into_a_failure() -> None:
    short, broken = few_gpus(), result("failed", Record(name="x", outcome="failed", reason="bad"))
    assert decide(replace(run(short), machine=Machine())).reasons == (SHORT,)
    hangs = Machine(problem="NVML hangs")
    verdict = decide(replace(run(short), machine=hangs))
    assert (verdict.exit_code, verdict.reasons) == (
        1,
        ("the GPUs could not be asked: NVML hangs", SHORT),
    )
    assert decide(replace(run(broken), machine=hangs)).reasons == ("bad",)


@pytest.mark.parametrize(("is_check", "code"), [(True, 10), (False, 0)])
def test_checks_that_all_lack_a_gpu_are_a_shortfall(is_check: bool, code: int) -> None:
    """People's own tests may skip; a pod whose GPUs have vanished must never exit 0."""
    lacking = CheckResult(
        nodeid="t.py::t", outcome="skipped", is_check=is_check, hardware_skip=True, reason="no GPU"
    )
    assert decide(run(lacking)).exit_code == code


def test_a_file_that_cannot_be_imported_comes_before_the_interruption_it_causes() -> None:
    broken = CheckResult(
        nodeid="t.py", outcome="error", is_check=False, reason="could not be collected: x"
    )
    verdict = decide(run(broken), exit_status=2)
    assert verdict.exit_code == 2
    assert verdict.line == "NOT READY: t.py failed: could not be collected: x (+1 more)"
    assert verdict.reasons[-1] == "the run was interrupted"


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("GPU 1", "GPU 1: hot; cool it"),
        ("cuda:0 -> cuda:2", "GPU 0 -> GPU 2: hot; cool it"),
        ("CPU", "hot; cool it"),
    ],
)
def test_the_line_names_the_gpu(device: str, line: str) -> None:
    record = Record(name="t", outcome="failed", device=device, reason="hot", remedy="cool it")
    assert sentence(record) == line


def test_strict_turns_unknown_into_a_failure_that_is_no_shortfall() -> None:
    unknown = Record(name="ECC", outcome="unknown", reason="ECC could not be read.")
    report = run(result("passed", GOOD, unknown))
    assert decide(report).exit_code == 0
    verdict = decide(report, strict=True)
    assert (verdict.exit_code, verdict.line) == (1, "NOT READY: ECC could not be read")
    # The hook may have failed the test for it already: told once.
    assert decide(run(result("failed", GOOD, unknown)), strict=True).reasons == verdict.reasons


def test_strict_turns_hardware_skips_into_shortfalls_and_leaves_the_others() -> None:
    hardware = result("skipped", reason="needs 2 GPUs; found no GPU", hardware_skip=True)
    other = result("skipped", reason="not today")
    assert decide(run(result("passed", GOOD), other), strict=True).ready
    verdict = decide(run(result("passed", GOOD), other, hardware), strict=True)
    assert (verdict.exit_code, verdict.reasons) == (10, ("needs 2 GPUs; found no GPU",))
    assert decide(run(result("passed", GOOD), hardware)).ready


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (2, "the run was interrupted"),
        (3, "pytest had an internal error"),
        (4, "pytest was used wrongly"),
        (5, "no test was collected"),
        (77, "another plugin ended the run with 77"),
    ],
)
def test_other_exit_codes_are_kept_and_never_ready(status: int, text: str) -> None:
    verdict = decide(run(result("passed", GOOD)), exit_status=status)
    assert (verdict.ready, verdict.exit_code) == (False, status)
    assert verdict.line == f"NOT READY: {text}"


def test_interrupted_names_what_was_running_and_still_tells_failures() -> None:
    report = replace(run(few_gpus()), running="t.py::test_load")
    verdict = decide(report, exit_status=2)
    assert verdict.line == "NOT READY: the run was interrupted during t.py::test_load (+1 more)"
    assert verdict.reasons[1] == SHORT


def test_exit_1_without_a_failed_test_stays_1() -> None:
    verdict = decide(run(result("passed", GOOD)), exit_status=1)
    assert (verdict.ready, verdict.exit_code) == (False, 1)
    assert verdict.line == "NOT READY: pytest ended with exit code 1 although no test failed"


def test_the_same_reason_is_told_once() -> None:
    assert len(decide(run(few_gpus(), few_gpus())).reasons) == 1


def test_sentence() -> None:
    assert sentence(speed().records[0]) == (
        "decoding is slower than half the bandwidth floor; "
        "torch.backends.cuda.enable_cudnn_sdp(False)"
    )


def test_sentence_without_a_reason_names_device_and_remedy() -> None:
    record = Record(
        name="peak",
        outcome="failed",
        expected=1,
        measured=2,
        device="GPU 3",
        remedy="rent another",
    )
    assert sentence(record) == "peak on GPU 3: expected 1, measured 2; rent another"
    assert sentence(replace(record, reason="it grew. ", remedy="")) == "GPU 3: it grew"


def test_several_of_each_are_counted_in_the_plural() -> None:
    warned = Record(name="x", outcome="warned", reason="hot")
    unknown = Record(name="y", outcome="unknown", reason="N/A")
    report = run(
        result("passed", GOOD, warned, warned, unknown, unknown),
        result("passed", GOOD),
        result("passed", is_check=False),
        result("passed", is_check=False),
        result("skipped", warned, reason="not today"),
    )
    assert decide(report).line == (
        "READY: 2 checks passed, 2 own tests passed, 2 warnings, 2 unknown, 1 skipped "
        "(no model was loaded)"
    )


def test_a_mixed_machine_is_named_card_by_card() -> None:
    mixed = machine(3)
    other = replace(mixed.gpus[1], name="NVIDIA L4")
    mixed = replace(mixed, gpus=(mixed.gpus[0], other, mixed.gpus[2]))
    name = mixed.gpus[0].name
    line = decide(replace(four_h100s(free_vram()), machine=mixed)).line
    assert line == (f"READY: llama-3.3-70b in 16bit on 2 x {name} + 1 x NVIDIA L4: 1 check passed")
    without = decide(replace(four_h100s(free_vram()), machine=None)).line
    assert without == "READY: llama-3.3-70b in 16bit: 1 check passed"


def test_what_the_run_left_out_is_told_when_it_fails() -> None:
    bad = result("failed", reason="boom")
    cpu = replace(run(bad, bad), tier="cpu")
    assert decide(cpu).line == (
        "NOT READY: test_x.py::test_x failed: boom (cpu tier: no GPU was checked)"
    )
    simulated = replace(run(bad), machine=replace(machine(2), simulated="2xA6000"))
    assert decide(simulated).line == (
        "NOT READY: test_x.py::test_x failed: boom (simulated 2xA6000: plan only)"
    )


def test_worst_first_whatever_the_order() -> None:
    unknown = Record(name="ECC", outcome="unknown", reason="ECC unread")
    broken = Record(name="copies", outcome="failed", reason="bytes differ")
    verdict = decide(
        run(
            few_gpus(),
            result("passed", unknown),
            result("error", reason="crash"),
            result("failed", broken),
        ),
        strict=True,
    )
    assert verdict.reasons == (
        "bytes differ",
        "test_x.py::test_x failed: crash",
        "ECC unread",
        SHORT,
    )
    assert verdict.line == "NOT READY: bytes differ (+3 more)"


def test_a_shortfall_exit_code_with_nothing_failed_is_no_failure() -> None:
    assert decide(run(result("passed", GOOD)), exit_status=10).ready


def test_a_skip_for_hardware_without_words_under_strict() -> None:
    verdict = decide(run(result("skipped", hardware_skip=True)), strict=True)
    assert verdict.reasons == ("test_x.py::test_x was skipped",)


def test_strict_skips_leave_later_failures_to_be_told() -> None:
    checks = (result("skipped", reason="s"), result("failed", reason="boom"))
    assert decide(run(*checks)).exit_code == 1
    unmeasured = Record(name="ECC", outcome="unknown", reason="ECC unread")
    both = (result("failed", unmeasured), result("failed", reason="boom"))
    assert decide(run(*both), strict=True).reasons == (
        "test_x.py::test_x failed: boom",
        "ECC unread",
    )
