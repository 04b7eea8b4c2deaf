"""One clear error, whatever damaged bytes do to a reader. Imports errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import ProbeFileError


class RefusedError(Exception):
    """Why a pickle is not read, without the file's name."""


def guarded(source: object, read: Callable[[], Any]) -> Any:
    """``read()``, every failure of it as one ProbeFileError that begins with ``source``."""
    try:
        return read()
    except ProbeFileError:
        raise
    except RefusedError as error:
        raise ProbeFileError(f"{source}: {error}; do not load it with pickle or torch") from error
    except Exception as error:  # Damaged bytes can fail anywhere in the unpickler.
        kind = type(error).__name__
        raise ProbeFileError(f"{source}: is damaged ({kind}); copy or export it again") from error
