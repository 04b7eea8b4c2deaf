"""Skips beside the list of expected ones, exact both ways. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..records.check import Record
from ..records.report import CheckResult

NAME = "expected skips"
_LIKE = "test_machine.py::test_health"


@dataclass(frozen=True)
class ExpectedSkips:
    """What ``--gpu-expected-skips`` lists."""

    file: str
    reasons: Mapping[str, str]
    """Node id, or its end from a folder on, to text that the skip's reason must contain."""

    def entry(self, nodeid: str) -> str | None:
        """The longest entry that means this test; None if it is not listed."""
        found = [name for name in self.reasons if means(name, nodeid)]
        return max(found, key=len, default=None)


def means(entry: str, nodeid: str) -> bool:
    """``test_machine.py::test_health`` means the test of that name in any folder."""
    return nodeid == entry or nodeid.endswith(f"/{entry}")


def parse_expected_skips(text: str, file: str) -> ExpectedSkips:
    """Node ids one a line (``#`` starts a comment line), or JSON: a list of them, or an object
    of node id to text that the reason must contain.

    :raises UsageError: naming the file, the line or key, and the remedy.
    """
    where = f"--gpu-expected-skips: {file}"
    if text.lstrip().startswith(("[", "{")):
        rows = _from_json(text, where)
    else:
        numbered = ((f"line {n}", line.strip()) for n, line in enumerate(text.splitlines(), 1))
        rows = [(at, line, "") for at, line in numbered if line and not line.startswith("#")]
    reasons: dict[str, str] = {}
    for at, name, reason in rows:
        if not name or name != name.strip():
            raise UsageError(f"{where}: {at}: {name!r} is not a node id; write it like {_LIKE}")
        if name in reasons:
            raise UsageError(f"{where}: {at}: {name} is listed twice; remove one")
        reasons[name] = reason
    return ExpectedSkips(file=file, reasons=reasons)


def _from_json(text: str, where: str) -> list[tuple[str, str, str]]:
    def pairs(found: list[tuple[str, object]]) -> list[tuple[str, object]]:
        return found  # a dict would hide a key that is written twice

    try:
        data = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: malformed JSON: {error}") from None
    rows = []
    for number, entry in enumerate(data):
        name, reason = entry if isinstance(entry, tuple) else (entry, "")
        if not isinstance(name, str):
            raise UsageError(
                f"{where}: entry {number}: {name!r} is not a node id; write it like {_LIKE}"
            )
        if not isinstance(reason, str):
            raise UsageError(f"{where}: {name}: {reason!r} is not text; write the skip's reason")
        rows.append((f"entry {number}", name, reason))
    return rows


def judge_skips(checks: Sequence[CheckResult], expected: ExpectedSkips) -> CheckResult:
    """Every skip is listed, with its reason, and everything listed was skipped."""
    records = [
        *_surprises(checks, expected),
        *(record for name in expected.reasons for record in _kept(name, checks, expected.file)),
    ]
    skipped = sum(check.outcome == "skipped" for check in checks)
    if not records:
        records.append(
            Record(name=NAME, outcome="passed", expected=skipped, measured=skipped, unit="tests")
        )
    return CheckResult(
        nodeid=f"expected skips {expected.file}",
        outcome="failed" if any(r.outcome == "failed" for r in records) else "passed",
        records=tuple(records),
        is_check=False,
    )


def _surprises(checks: Sequence[CheckResult], expected: ExpectedSkips) -> list[Record]:
    records = []
    for check in checks:
        if check.outcome != "skipped":
            continue
        entry = expected.entry(check.nodeid)
        if entry is None:
            reason = f"{check.nodeid} was skipped and {expected.file} does not list it"
            if check.reason:
                reason += f": {check.reason}"
            records.append(_failed(reason, "make it run, or add it to the file"))
        elif expected.reasons[entry] not in check.reason:
            records.append(
                _failed(
                    f"{check.nodeid} was skipped for another reason than {expected.file} says: "
                    f"expected {expected.reasons[entry]!r}, found {check.reason!r}",
                    "make it run, or correct the reason in the file",
                )
            )
    return records


def _kept(entry: str, checks: Sequence[CheckResult], file: str) -> list[Record]:
    meant = {check.nodeid: check.outcome for check in checks if means(entry, check.nodeid)}
    if len(meant) > 1:
        return [
            _failed(
                f"{file} lists {entry}, which means {len(meant)} tests: {', '.join(meant)}",
                "write more of its path",
            )
        ]
    outcome = next(iter(meant.values()), None)
    if outcome == "skipped":
        return []
    ended = "did not run" if outcome is None else f"was not skipped: it {_ENDED[outcome]}"
    return [_failed(f"{file} lists {entry}, which {ended}", "remove it from the file")]


_ENDED = {"passed": "passed", "failed": "failed", "error": "ended in an error"}


def _failed(reason: str, remedy: str) -> Record:
    return Record(
        name=NAME,
        outcome="failed",
        expected="exactly the listed skips",
        reason=reason,
        remedy=remedy,
    )
