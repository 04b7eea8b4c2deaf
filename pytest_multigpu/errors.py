"""The one exception tree.

::

    MultiGpuError
    ├── UsageError          what the user wrote is wrong: names file, key and remedy
    │   └── ProbeFileError  a probe file that is damaged, refused or unknown
    ├── MachineError        the machine could not be asked (not: it has no GPU)
    ├── CheckpointError     a checkpoint that is missing, incomplete or damaged
    ├── LoadError           the model could not be put on the devices
    └── ScoringError        a score could not be computed; never turned into a score

Imports nothing.
"""

from __future__ import annotations


class MultiGpuError(Exception):
    """Base of every error this package raises on purpose. ``str(error)`` is one line."""


class UsageError(MultiGpuError):
    """Bad input. The text names the option, file or key, what was wrong, and the remedy."""


class ProbeFileError(UsageError):
    """A probe file that is damaged, refused (it would run code) or of no known format."""


class MachineError(MultiGpuError):
    """Asking the machine failed: no driver answer, a dead or hung worker. Not "no GPU"."""


class CheckpointError(MultiGpuError):
    """A checkpoint that is missing, incomplete or damaged."""


class LoadError(MultiGpuError):
    """The model could not be loaded as planned."""


class ScoringError(MultiGpuError):
    """A probe score could not be computed."""
