"""Reading files that people name. Imports the standard library only."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path) -> None:
    """A pipe or a device would block for ever or never end.

    :raises OSError: it is no regular file, or is not there; ``strerror`` says which.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


def read_bytes(path: Path) -> bytes:
    """:raises OSError: it cannot be read, or is no regular file."""
    check_regular(path)
    return path.read_bytes()


def read_text(path: Path) -> str:
    """:raises OSError: it cannot be read, or is no regular file.
    :raises UnicodeDecodeError: it is not UTF-8.
    """
    check_regular(path)
    return path.read_text(encoding="utf-8")


def why_unread(error: Exception) -> str:
    """The system's reason alone: its number and the path are no help to anybody."""
    return str(getattr(error, "strerror", None) or error)
