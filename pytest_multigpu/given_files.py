"""Files in JSON that options name: device maps, catalogues. Knows no pytest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .files import read_text, why_unread

if TYPE_CHECKING:
    from .planning.catalogue import GpuType


def read_json(path: Path, option: str) -> Any:
    """The contents of a JSON file that an option names.

    :raises UsageError: unreadable or malformed; names the option and the file.
    """
    try:
        return json.loads(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option}: {path}: cannot be read: {why_unread(error)}") from None
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise UsageError(f"{option}: {path}: malformed JSON: {error}") from None


def read_catalogue(path: Path | None) -> tuple[GpuType, ...]:
    """The built-in GPU types, with the rows of ``--gpu-catalogue`` changed or added."""
    from .planning.catalogue import CATALOGUE, merge_catalogue

    if path is None:
        return CATALOGUE
    return merge_catalogue(read_json(path, "--gpu-catalogue"), source=str(path))
