"""One verdict over a fleet: READY only if every machine is."""

from __future__ import annotations

import pytest

from pytest_multigpu.judging.fleet import decide_fleet
from pytest_multigpu.records.report import Pod, RunReport, Verdict
from pytest_multigpu.report.fleet import fleet_lines

WHOLE = Verdict(ready=True, exit_code=0, line="READY: 9 checks passed")


def pod(name: str, code: int, *reasons: str, ready: bool | None = None) -> Pod:
    good = code == 0 if ready is None else ready
    line = "READY: 1 check passed" if good else f"NOT READY: {reasons[0]}"
    verdict = Verdict(ready=good, exit_code=code, line=line, reasons=reasons)
    return Pod(name=name, host="h", report=RunReport(verdict=verdict))


def test_all_ready() -> None:
    verdict = decide_fleet([pod("a", 0), pod("b", 0)], WHOLE)
    assert (verdict.ready, verdict.exit_code) == (True, 0)
    assert verdict.line == "READY: 2 machines, every one ready"


def test_one_machine_is_no_plural() -> None:
    assert decide_fleet([pod("a", 0)], WHOLE).line == "READY: 1 machine, every one ready"


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 10), 10), ((10, 1), 1), ((1, 10), 1), ((0, 1), 1)]
)
def test_the_worst_code(codes: tuple[int, int], code: int) -> None:
    pods = [pod(f"p{n}", one, "it is bad; rent another") for n, one in enumerate(codes)]
    verdict = decide_fleet(pods, Verdict(ready=False, exit_code=1, line="NOT READY: x"))
    assert (verdict.ready, verdict.exit_code) == (False, code)


def test_who_is_not_ready_and_why() -> None:
    pods = [pod("a", 0), pod("b", 1, "GPU 3 is lost", "more"), pod("c", 10, "no GPU")]
    verdict = decide_fleet(pods, Verdict(ready=False, exit_code=1, line="NOT READY: x"))
    assert verdict.line == "NOT READY: 2 of 3 machines: b (h): GPU 3 is lost (+1 more)"
    assert verdict.reasons == ("b (h): GPU 3 is lost", "c (h): no GPU")


def test_a_machine_that_checked_nothing_is_not_ready() -> None:
    silent = pod("b", 0, "no check was executed", ready=False)
    verdict = decide_fleet([pod("a", 0), silent], WHOLE)
    assert (verdict.ready, verdict.exit_code) == (False, 0)


def test_an_interrupted_run_keeps_its_own_verdict() -> None:
    whole = Verdict(ready=False, exit_code=2, line="NOT READY: the run was interrupted")
    assert decide_fleet([pod("a", 0)], whole) is whole


def test_no_table_without_a_fleet() -> None:
    assert fleet_lines(()) == []
