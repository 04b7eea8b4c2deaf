"""What the plugin adds to a run that has nothing to do with GPUs.

    python benchmarks/overhead.py --pairs 41

Runs pytest on one empty test with and without the plugin, in alternating pairs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description="what the plugin adds to an empty run")
    parser.add_argument("--pairs", type=int, default=41)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_empty.py").write_text("def test_empty(): pass\n")
        pairs = [
            (seconds(folder, "-p", "no:multigpu"), seconds(folder)) for _ in range(options.pairs)
        ]
    extra = statistics.median(mine - without for without, mine in pairs)
    without, mine = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"median of {len(pairs)} paired differences: {1e3 * extra:.1f} ms")
    print(f"medians: {1e3 * without:.0f} ms without, {1e3 * mine:.0f} ms with")
    return 0


def seconds(folder: str, *arguments: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
