"""JUnit properties of a test, for ``item.user_properties``: the same records as everywhere.

Imports records.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..records.check import Record
from .words import expected_text, measured_text, shown_device

# What XML 1.0 cannot hold, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def properties(records: Sequence[Record]) -> list[tuple[str, str]]:
    """``("free VRAM [GPU 0]", "passed: expected at least 36.0 GiB, measured 78.7 GiB")``."""
    rows = []
    for record in records:
        name = record.name + (f" [{shown_device(record.device)}]" if record.device else "")
        text = (
            f"{record.outcome}: expected {expected_text(record)}, measured {measured_text(record)}"
        )
        for part in (record.reason.rstrip(". "), record.remedy):
            text += f"; {part}" if part else ""
        rows.append((_NOT_XML.sub("?", name), _NOT_XML.sub("?", text)))
    return rows
