"""The xdist controller's side: one scheduler rule, and the workers' facts made into one run.

The hooks that only xdist calls are optional: without it they are never called.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from ..fixtures import session_of
from ..records.machine import Machine
from ..records.report import CheckResult, Pod, RunReport
from .wire import FACTS, HOST, REFUSED, TOGETHER, unpack


class XdistController:
    """A plugin object, registered in the controller only."""

    def __init__(self, config: pytest.Config) -> None:
        self.dist: str = config.getoption("dist", "no")
        self._facts: dict[str, dict[str, Any]] = {}
        """By worker."""
        self._hosts: dict[str, str] = {}
        self.refused: list[str] = []
        """Usage errors that workers met, each once."""
        self._folder = TemporaryDirectory(prefix="pytest-multigpu-")

    @property
    def is_fleet(self) -> bool:
        """Every worker runs every test: they are machines, not hands."""
        return self.dist == "each"

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput[TOGETHER] = None if self.is_fleet else self._folder.name

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        from .scheduling import KNOWN, Scheduling

        if self.dist not in KNOWN:
            return None
        return Scheduling(
            self.dist,
            self._folder.name,
            config,
            log,
            takes_gpus=lambda: session_of(config).settings.takes_gpus,
        )

    def pytest_unconfigure(self) -> None:
        self._folder.cleanup()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodeready(self, node: Any) -> None:
        self._facts.setdefault(node.gateway.id, {})

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        output = getattr(node, "workeroutput", {})
        refused = output.get(REFUSED)
        if refused is not None:
            text = f"{node.gateway.id}: {refused}" if self.is_fleet else refused
            self.refused += [text] if text not in self.refused else []
        if FACTS in output:
            self._facts[node.gateway.id] = unpack(output[FACTS])
            self._hosts[node.gateway.id] = output.get(HOST, "")

    def hear(self, report: pytest.TestReport) -> str:
        """Take the facts that came with a worker's report; gives the worker's name."""
        worker: str = report.node.gateway.id
        facts = getattr(report, "gpu", {}).get(FACTS)
        if facts:
            self._facts[worker] = unpack(facts)
        return worker

    def facts(self) -> dict[str, Any]:
        """What the workers know, as one run."""
        return merged(self._facts.values())

    def pods(self, report: RunReport) -> tuple[Pod, ...]:
        """The run of each worker of a fleet."""
        found = []
        for name, facts in sorted(self._facts.items()):  # not as their reports came in
            checks = tuple(check for check in report.checks if check.worker in ("", name))
            if not any(check.worker for check in checks):
                checks += (_silent(name),)
            own = replace(report, **facts, checks=checks, spans=(), vram=())
            found.append(Pod(name=name, host=self._hosts.get(name, ""), report=own))
        return tuple(found)


def _silent(name: str) -> CheckResult:
    return CheckResult(
        nodeid=name, outcome="error", reason=f"{name} ran no test", is_check=False, worker=name
    )


def merged(all_facts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of the worker that knows most (it loaded a model, made a plan, sees most GPUs), with the
    peaks of all; where each had a GPU of its own, the machine shows all of those."""
    known = [facts for facts in all_facts if facts]
    if not known:
        return {}
    best = max(known, key=_knowledge)
    facts = {**best, "peaks": tuple(peak for one in known for peak in one.get("peaks", ()))}
    unsettled = next((one["unsettled"] for one in known if "unsettled" in one), None)
    if unsettled is not None:
        facts["unsettled"] = unsettled
    machines = [one["machine"] for one in known if "machine" in one]
    if machines and "plan" not in best:
        facts["machine"] = _together(machines)
    return facts


def _knowledge(facts: dict[str, Any]) -> tuple[bool, bool, int]:
    machine = facts.get("machine")
    return "load" in facts, "plan" in facts, len(machine.visible) if machine else 0


def _together(machines: list[Machine]) -> Machine:
    widest = max(machines, key=lambda machine: len(machine.visible))
    # One worker may have waited for the others and seen their memory in use.
    visible = tuple(sorted({index for machine in machines for index in machine.visible}))
    if set(visible) == set(widest.visible):
        return widest
    order = {index: position for position, index in enumerate(visible)}
    gpus = tuple(replace(gpu, cuda_index=order.get(gpu.index)) for gpu in widest.gpus)
    return replace(widest, gpus=gpus, visible=visible)
