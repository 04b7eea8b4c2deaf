"""``python -m pytest_multigpu.probes``: an entry point named after what it is about. What it starts
stands above this package, and nothing imports this module."""

from __future__ import annotations

import sys

from ..probe_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
