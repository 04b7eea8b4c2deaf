"""Facts from an xdist worker to the controller: records, packed into text that any wire takes.

Unpacking makes nothing but this package's records: what a worker sends is data.
"""

from __future__ import annotations

import base64
import io
import pickle
from typing import Any

FACTS = "multigpu_facts"
"""Key of packed facts in a test report's notes and in ``workeroutput``."""
TOGETHER = "multigpu_together"
"""Key in ``workerinput``: the controller's scheduler keeps the group together."""
_RECORDS = f"{__package__}.records."


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
