"""Files that are whole at every moment, whoever is killed, and whenever.

Every write goes to a temporary file beside the target, is synced and renamed. Imports the standard
library.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str) -> None:
    """Replace ``path`` with ``content`` (UTF-8) as a whole or not at all.

    :raises OSError: the folder cannot be written; ``path`` is then as it was.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes 0600; a report is for everyone whom the umask lets read.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """``data`` as JSON, whole or not at all. ``ValueError`` on NaN: it would not be JSON.

    A line for each key, and for each row of a list: as quick as without any indentation, which
    counts in a file that is rewritten at every test, and still fit to read and to compare.
    """
    if isinstance(data, dict) and data:
        lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in data.items()]
        write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")
    else:
        write_atomic(path, json.dumps(data, allow_nan=False) + "\n")


def _compact(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = ",\n ".join(json.dumps(row, allow_nan=False) for row in value)
        return f"[\n {rows}\n]"
    return json.dumps(value, allow_nan=False)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock: whoever reads, changes and writes a file there waits.

    The folder's lock and not the file's: the file is replaced while it is held.

    :raises OSError: the folder cannot be made or opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
