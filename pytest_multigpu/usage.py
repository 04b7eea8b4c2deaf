"""Our usage errors as pytest's own, which it prints in one line; under xdist on another process.

Knows pytest; imports errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .errors import UsageError

WORKER = "multigpu-worker"
"""Name of the plugin that hands errors of an xdist worker to the controller."""


@contextmanager
def usage_errors(config: pytest.Config) -> Iterator[None]:
    """What is raised in the block ends the run with exit code 4; in an xdist worker it is handed
    to the controller, and the worker runs nothing."""
    try:
        yield
    except UsageError as error:
        worker = config.pluginmanager.get_plugin(WORKER)
        if worker is None:
            raise pytest.UsageError(str(error)) from None
        worker.refuse(str(error))
