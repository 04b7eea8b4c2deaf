"""The one exception tree.

::

    MultiGpuError
    ├── UsageError          what the user wrote is wrong: names file, key and remedy
    │   └── ProbeFileError  a probe file that is damaged, refused or unknown
    ├── MachineError        the machine could not be asked (not: it has no GPU)
    ├── CheckpointError     a checkpoint that is missing, incomplete or damaged
    ├── LoadError           the model could not be put on the devices
    └── ScoringError        a score could not be computed; never turned into a score

Imports the standard library.
"""

from __future__ import annotations

import reprlib


def one_line(text: str) -> str:
    """``text`` with line breaks, escape sequences and lone surrogates written out (``\\n``).

    Names from people's files end up in messages; a terminal, JUnit and UTF-8 must bear them.
    """
    if text.isprintable():
        return text
    return "".join(part if part.isprintable() else repr(part)[1:-1] for part in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [""])[0]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 40
_SHORT.maxlevel = 3


def shown(value: object) -> str:
    """``repr`` of a value from somebody's file for a message: short, however large or deep."""
    return _SHORT.repr(value)


class MultiGpuError(Exception):
    """Base of every error this package raises on purpose. ``str(error)`` is one line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


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
