"""Gates and records into pytest outcomes, and onto pytest's reports for whoever prints them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import pytest

from . import gating
from .gating import allowed, fell_short, gate, obey
from .markers import check_needs
from .records.check import Record
from .report.junit import properties
from .session import GpuSession

RECORDS = pytest.StashKey[list[Record]]()
NEXT = pytest.StashKey["str | None"]()
"""Node id of the test that runs after this one."""
_UNMEASURED = "not measured: "
_PROPERTIES = pytest.StashKey[list[tuple[str, object]]]()
_HARDWARE_SKIP = pytest.StashKey[bool]()


def open_gate(item: pytest.Item, session: GpuSession) -> None:
    """Skip or fail a test before its setup where the machine lacks what it needs."""
    decision = gate(item, session)
    expected = session.expected_skips
    if expected is not None and expected.entry(item.nodeid) is not None:
        decision = allowed(decision)
    _forget(item)
    item.stash[_HARDWARE_SKIP] = decision.shortfall and decision.action == "skip"
    obey(decision)


def _forget(item: pytest.Item) -> None:
    """What an earlier attempt left, where pytest-rerunfailures tries again."""
    item.stash.setdefault(RECORDS, []).clear()
    before = item.stash.setdefault(_PROPERTIES, [])
    item.user_properties[:] = [one for one in item.user_properties if one not in before]
    before.clear()


def run_check(item: pytest.Function, *, strict: bool) -> None:
    """Call a check, keep its records on the item, and end the test as they say.

    Failed records fail it, as do unmeasured ones that READY rests on. A check that measured
    nothing else skips, or fails under strict; one that returns nothing fails: it cannot have
    checked anything.
    """
    wanted = inspect.signature(item.obj).parameters
    returned = item.obj(**{name: item.funcargs[name] for name in wanted})
    records = _as_records(returned)
    if records is None:
        pytest.fail(f"{item.name} returned {returned!r} instead of records", pytrace=False)
    item.stash[RECORDS] = records
    rows: list[tuple[str, object]] = [*properties(records)]  # --junitxml prints these
    item.stash[_PROPERTIES] = rows
    item.user_properties.extend(rows)
    failed = [record for record in records if record.outcome == "failed"]
    unknown = [record for record in records if record.outcome == "unknown"]
    failed += [record for record in unknown if strict or record.essential]
    if failed:
        pytest.fail("\n".join(dict.fromkeys(map(_sentence, failed))), pytrace=False)
    if unknown and len(unknown) == len(records):
        why = dict.fromkeys(record.reason.removeprefix(_UNMEASURED) for record in unknown)
        pytest.skip(_UNMEASURED + "; ".join(why))


def annotate(
    item: pytest.Item, report: pytest.TestReport, raised: BaseException | None = None
) -> None:
    """Put what we know onto pytest's report as plain data, which survives xdist's wire."""
    found = report.longrepr
    if report.skipped and isinstance(found, tuple) and found[0] == gating.__file__:
        path, line, _ = item.reportinfo()
        # Where the test stands, not where this plugin skipped it.
        report.longrepr = (str(path), 1 if line is None else line + 1, found[2])
    records = item.stash.get(RECORDS, [])
    notes: dict[str, Any] = {
        "is_check": check_needs(item) is not None,
        "shortfall": fell_short(raised),
        "hardware_skip": item.stash.get(_HARDWARE_SKIP, False),
        "next": item.stash.get(NEXT, None) if report.when == "teardown" else None,
        "records": [dataclasses.asdict(record) for record in records],
    }
    report.gpu = notes  # type: ignore[attr-defined]


def _sentence(record: Record) -> str:
    text = f"{record.device}: " if record.device and record.device not in record.reason else ""
    text += record.reason or f"{record.name}: expected {record.expected}, got {record.measured}"
    if record.outcome == "unknown" and _UNMEASURED not in text:
        text = f"{_UNMEASURED}{text}"
    return f"{text}; remedy: {record.remedy}" if record.remedy else text


def _as_records(returned: object) -> list[Record] | None:
    if isinstance(returned, Record):
        return [returned]
    if isinstance(returned, Iterable) and not isinstance(returned, str):
        records = list(returned)
        if records and all(isinstance(record, Record) for record in records):
            return records
    return None
