"""Facts from an xdist worker to the controller: records, packed into text that any wire takes.

Unpacking makes nothing but this package's records: what a worker sends is data.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FACTS = "multigpu_facts"
"""Key of packed facts in a test report's notes and in ``workeroutput``."""
HOST = "multigpu_host"
"""Key in ``workeroutput``: the name of the machine."""
REFUSED = "multigpu_refused"
"""Key in ``workeroutput``: a usage error that the worker met, or None."""
TOGETHER = "multigpu_together"
"""Key in ``workerinput``: the folder where workers name the tests to keep on one worker."""
_RECORDS = "pytest_multigpu.records."


def pack(facts: dict[str, Any]) -> str:
    """Records and plain values as ASCII text."""
    return base64.b64encode(pickle.dumps(facts, protocol=4)).decode("ascii")


def unpack(text: str) -> dict[str, Any]:
    """The inverse of :func:`pack`.

    :raises pickle.UnpicklingError: it holds something else than records and plain values.
    """
    facts = _RecordUnpickler(io.BytesIO(base64.b64decode(text))).load()
    if not isinstance(facts, dict):
        raise pickle.UnpicklingError("facts are not a dict")
    return facts


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_RECORDS) and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no record")


def name_group(folder: str | None, worker: str, nodeids: Sequence[str]) -> None:
    """A worker's list of the tests to keep together.

    Through a file, since xdist sends the controller nothing else before it schedules. A worker on
    another host has no such folder: there each worker that needs the machine waits for its turn.
    """
    if folder is not None and Path(folder).is_dir():
        path = Path(folder, f"{worker}.json")
        path.write_text(json.dumps(list(nodeids)), encoding="utf-8")


def read_group(folder: str) -> frozenset[str]:
    """All that the workers named."""
    names = (json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("*.json"))
    return frozenset(name for found in names for name in found)
