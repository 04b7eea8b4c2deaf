"""What LLM.int8's outliers do to a GPU's reserve follows from the columns that have some.

``benchmarks/outliers.py`` measured them; it replays what it found without a GPU too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUND = ROOT / "results" / "outliers-h200x4"


def test_replays_with_the_columns_found_end_where_torch_did(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "outliers.py")),
            *("--again", str(FOUND.with_suffix(".json")), "--beyond", "4"),
            *("--out", str(tmp_path / "again")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = (tmp_path / "again.md").read_text()
    assert shown == FOUND.with_suffix(".md").read_text()
    assert shown.count("\n| ") == 1 + 12  # a GPU of a case each
