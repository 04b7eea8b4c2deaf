"""What the tests that xdist ran wrote down, a line of JSON each. Imports the standard library."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows() -> list[Row]:
    """Those of the run in the current folder."""
    return [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]


def assert_one_process_at_a_time(found: Sequence[Row], share: Callable[[Row, Row], object]) -> None:
    """No two processes used one GPU at the same time.

    :param share: whether two tests had a GPU in common.
    """
    for one in found:
        for other in found:
            if share(one, other) and one["pid"] != other["pid"]:
                assert one["end"] <= other["start"] or other["end"] <= one["start"]
