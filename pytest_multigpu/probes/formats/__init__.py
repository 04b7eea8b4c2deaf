"""Reading and writing probe files, one module a format. Nothing here runs code from a file.

Sizes are checked before anything is allocated: no file makes the loader use more than 1 GiB.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import ProbeFileError
from ...files import check_regular, why_unread
from ..probe import Probe

MAX_FILE_BYTES = 64 << 20
"""A probe on every layer of a 126-layer, 16,384-wide model in float64 with its scaler: 50 MB."""
MAX_JSON_BYTES = 1 << 20


def load_probe(path: str | os.PathLike[str]) -> Probe:
    """The probe in a file or folder; its format is told by its first bytes, not its name.

    :raises ProbeFileError: missing, of no known format, damaged, too large, or refused because
        it would run code. One line that begins with the path.
    """
    found = Path(path)
    try:
        return _load(found)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise ProbeFileError(
            f"{found}: cannot be read: {why_unread(error)}; check the path"
        ) from error


def _load(found: Path) -> Probe:
    from . import apollo, gguf, linear_head, native

    if found.is_dir():
        if (found / linear_head.CONFIG).is_file():
            return linear_head.load(found)
        if (found / "probe.safetensors").is_file():
            return native.load(found / "probe.safetensors")
        raise ProbeFileError(
            f"{found}: holds neither {linear_head.CONFIG} nor probe.safetensors; "
            "name the probe's file"
        )
    if found.suffix == ".json" and found.with_suffix(".safetensors").is_file():
        found = found.with_suffix(".safetensors")
    data = read_bounded(found)
    if data[:4] == b"GGUF":
        return gguf.load(found, data)
    if data[:4] == b"PK\x03\x04" or linear_head.has_config(found):
        return linear_head.load(found)
    if native.is_safetensors(data):
        return native.load(found, data)
    if data[:1] == b"\x80":
        return apollo.load(found, data)
    if data[8:9] == b"{":
        # A length beyond any probe's: the reader says so.
        return native.load(found, data)
    raise ProbeFileError(
        f"{found}: is of no known probe format; known: Apollo detector.pt, safetensors with JSON, "
        "a linear head with probe_config.json, gguf control vector"
    )


def save_probe(probe: Probe, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes the project's own format: ``NAME.safetensors`` and ``NAME.json`` beside it.

    :returns: both paths, the tensors' first.
    :raises ProbeFileError: ``path`` does not end in ``.safetensors``, or can't be written.
    """
    from .writing import write_probe

    target = Path(path)
    if target.suffix != ".safetensors":
        raise ProbeFileError(f"{target}: does not end in .safetensors; name it so")
    tensors, sidecar = write_probe(probe, target)
    return tensors, sidecar


def read_bounded(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """A whole file of at most ``limit`` bytes.

    :raises ProbeFileError: it cannot be read, is empty or larger.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise ProbeFileError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise ProbeFileError(f"{path}: cannot be read: {why_unread(error)}") from error
    if len(data) > limit:
        raise ProbeFileError(f"{path}: is larger than {limit >> 20} MiB, too large for a probe")
    if not data:
        raise ProbeFileError(f"{path}: is empty; copy it again")
    return data
