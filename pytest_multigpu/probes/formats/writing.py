"""A probe written in any format that is read. What would be lost is refused by name: every file is
read back, and compared, before it takes its place.

Imports the formats, :mod:`..probe` and errors; numpy inside functions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ProbeFileError
from ...files import why_unread
from ..probe import Probe
from . import apollo, gguf, linear_head, native

Files = Mapping[str, bytes]
"""Name to content."""


@dataclass(frozen=True, kw_only=True)
class _Format:
    title: str
    files: Callable[[Probe, str], Sequence[Files]]
    """The layouts that a probe can be written in under a name, the most usual first."""
    unfit: Callable[[Probe], str] = lambda _: ""
    """Why it can't be written at all."""


_FORMATS = {
    ".safetensors": _Format(title="safetensors with JSON", files=native.files),
    ".pt": _Format(title="an Apollo detector", files=apollo.files),
    ".gguf": _Format(title="a gguf control vector", files=gguf.files, unfit=gguf.unfit),
    "": _Format(title="a linear head", files=linear_head.files, unfit=linear_head.unfit),
}


def write_probe(probe: Probe, path: Path, *, lossy: bool = False) -> tuple[Path, ...]:
    """Writes ``NAME.safetensors`` and ``NAME.json``, ``NAME.pt`` as an Apollo detector,
    ``NAME.gguf``, or a folder with a linear head; the path says which.

    :param lossy: leave out what the format can't carry, if it does not enter a score.
    :returns: the files written.
    :raises ProbeFileError: no such format, it can't carry this probe, or nothing can be written.
    """
    try:
        chosen = _FORMATS.get("" if path.is_dir() else path.suffix)
        if chosen is None:
            raise ProbeFileError(
                f"{path}: is no folder (linear head) and does not end in .safetensors, .pt "
                "(Apollo's) or .gguf; name it so"
            )
        unfit = chosen.unfit(probe) or _misplaced(path)
        if unfit:
            raise ProbeFileError(f"{path}: {chosen.title} {unfit}; write .safetensors")
        return _write(probe, path, chosen, lossy=lossy)
    except OSError as error:
        raise ProbeFileError(
            f"{path}: cannot be written: {why_unread(error)}; choose another place"
        ) from error


def _write(probe: Probe, path: Path, chosen: _Format, *, lossy: bool) -> tuple[Path, ...]:
    layouts = chosen.files(probe, path.name)
    losses = []
    for files in layouts:
        with _scratch(path) as scratch:
            losses.append(_losses(probe, _read_back(scratch, path, files)))
    least, files = min(zip(losses, layouts, strict=True), key=lambda pair: _weight(pair[0]))
    if least and not (lossy and not any(loss.scored for loss in least)):
        raise ProbeFileError(f"{path}: {_refusal(chosen.title, least)}")
    with _scratch(path) as scratch:
        _read_back(scratch, path, files)
        return _move(scratch, path, files)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside the target, so that what was read back need only be renamed."""
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=path.parent) as name:
        yield Path(name)


def _misplaced(path: Path) -> str:
    """What lies there already and would be read instead."""
    if path.suffix == ".pt" and (path.parent / linear_head.CONFIG).is_file():
        return f"beside {linear_head.CONFIG} would be read as a linear head"
    others = {linear_head.CONFIG, linear_head.WEIGHTS[0]}
    if path.is_dir() and any(item.name not in others for item in path.iterdir()):
        return "needs a folder of its own, and this one holds other files"
    return ""


def _read_back(scratch: Path, path: Path, files: Files) -> Probe:
    from . import load_probe

    folder = scratch / path.name if linear_head.CONFIG in files else scratch
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        return load_probe(scratch / path.name)
    except ProbeFileError as error:
        text = str(error).replace(f"{scratch}/", "")
        raise ProbeFileError(f"{path}: could not be read back: {text}") from error


def _move(scratch: Path, path: Path, files: Files) -> tuple[Path, ...]:
    inside = linear_head.CONFIG in files
    source, target = (scratch / path.name, path) if inside else (scratch, path.parent)
    target.mkdir(exist_ok=True)
    return tuple((source / name).replace(target / name) for name in files)


@dataclass(frozen=True, kw_only=True)
class _Loss:
    what: str
    scored: bool
    """It enters a score."""


def _losses(probe: Probe, again: Probe) -> list[_Loss]:
    """What is not as it was after reading back."""
    found = []
    for name in ("site", "aggregation", "bias", "model", "positive_class", "threshold"):
        value = getattr(probe, name)
        if value != getattr(again, name):
            text = f"{name.replace('_', ' ')} {'none' if value is None else value}"
            found.append(_Loss(what=text, scored=name in ("site", "aggregation", "bias")))
    if probe.mask != again.mask:
        found.append(_Loss(what="the token mask", scored=True))
    if not _same(probe.directions, again.directions):
        found.append(_Loss(what="digits of the direction", scored=True))
    scaler = [(probe.mean, again.mean), (probe.scale, again.scale)]
    if probe.normalize != again.normalize or not all(_same(a, b) for a, b in scaler):
        found.append(_Loss(what="mean and scale", scored=probe.normalize))
    return found


def _same(a: Sequence[Any] | None, b: Sequence[Any] | None) -> bool:
    import numpy as np

    if a is None or b is None:
        return a is b
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _weight(losses: Sequence[_Loss]) -> tuple[int, int]:
    return sum(loss.scored for loss in losses), len(losses)


def _refusal(title: str, losses: Sequence[_Loss]) -> str:
    scored = [loss.what for loss in losses if loss.scored]
    if not scored:
        said = " and ".join(loss.what for loss in losses)
        return (
            f"{title} can't carry {said}; --lossy leaves that out, which changes no score, and "
            ".safetensors carries it"
        )
    fold = "mean and scale" in scored
    help_ = "--fold puts mean and scale into direction and bias, and " if fold else ""
    return (
        f"{title} can't carry {' and '.join(scored)}, and would score otherwise; "
        f"{help_}.safetensors carries all"
    )
