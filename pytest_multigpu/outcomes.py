"""Records into pytest outcomes: what a shipped check returned decides how its test ends."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import pytest

from .records.check import Record

RECORDS = pytest.StashKey[list[Record]]()


def run_check(item: pytest.Function, *, strict: bool) -> None:
    """Call a check, keep its records on the item, and end the test as they say.

    Failed records fail it. A check that measured nothing skips, or fails under strict; one that
    returns nothing fails: it cannot have checked anything.
    """
    wanted = inspect.signature(item.obj).parameters
    returned = item.obj(**{name: item.funcargs[name] for name in wanted})
    records = _as_records(returned)
    if records is None:
        pytest.fail(f"{item.name} returned {returned!r} instead of records", pytrace=False)
    item.stash[RECORDS] = records
    failed = [record for record in records if record.outcome == "failed"]
    unknown = [record for record in records if record.outcome == "unknown"]
    if strict:
        failed += unknown
    if failed:
        pytest.fail("\n".join(map(sentence, failed)), pytrace=False)
    if unknown and len(unknown) == len(records):
        pytest.skip("not measured: " + "; ".join(record.reason for record in unknown))


def sentence(record: Record) -> str:
    """``GPU 2: 12.0 GiB free, 40.0 needed; remedy: stop the other process``"""
    text = f"{record.device}: " if record.device and record.device not in record.reason else ""
    text += record.reason or f"{record.name}: expected {record.expected}, got {record.measured}"
    if record.outcome == "unknown":
        text = f"not measured: {text}"
    return f"{text}; remedy: {record.remedy}" if record.remedy else text


def _as_records(returned: object) -> list[Record] | None:
    if isinstance(returned, Record):
        return [returned]
    if isinstance(returned, Iterable) and not isinstance(returned, str):
        records = list(returned)
        if records and all(isinstance(record, Record) for record in records):
            return records
    return None
