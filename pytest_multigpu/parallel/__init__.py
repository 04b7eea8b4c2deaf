"""Under pytest-xdist: workers that own GPUs, and the controller that hears of their runs.

``grouping`` tells which tests go together, ``scheduling`` sends them, ``worker`` locks the GPUs,
``wire`` packs what a worker knows, ``controller`` puts it together. Part of the top layer.
"""

from __future__ import annotations

import pytest


def distributes(config: pytest.Config) -> bool:
    """This process is xdist's controller. ``--dist`` alone, without workers, is not enough."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        return False
    return bool(config.getoption("tx", None))
