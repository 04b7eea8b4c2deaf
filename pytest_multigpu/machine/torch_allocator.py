"""How the environment sets torch's caching allocator. Imports what is installed, not torch.

Read as ``c10/core/AllocatorConfig.cpp`` does: ``PYTORCH_CUDA_ALLOC_CONF``, or its newer name
``PYTORCH_ALLOC_CONF``, which torch up to 2.9 ignores for CUDA
(https://github.com/pytorch/pytorch/issues/183387).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..installed import installed_versions

NEW_NAME, OLD_NAME = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
NEW_SINCE = (2, 10)
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
_EXPANDABLE, _FIXED = "expandable_segments:True", "expandable_segments:False"
_HOST = "pinned_"
"""Such options are about the host's memory."""


def expandable_segments(environ: Mapping[str, str]) -> bool:
    """Whether segments grow, and nothing else about the allocator is set."""
    return _expandable(environ) is True


def unlike_planned(environ: Mapping[str, str]) -> str | None:
    """A sentence if torch's allocator is set to go by rules that no plan follows, or by a name
    that this torch does not read; None if it is as by default or has expandable segments."""
    read = _read(environ)
    if not read and (text := environ.get(NEW_NAME, "").strip()):
        version = installed_versions("torch")["torch"]
        return f"{NEW_NAME}={text}: torch {version} does not read it for CUDA; set {OLD_NAME}"
    if _expandable(environ) is not None:
        return None
    set_ = {**read, UNCACHED: environ[UNCACHED]} if _uncached(environ) else read
    found = [f"{name}={text}" for name, text in set_.items()]
    return (
        f"{' '.join(found)}: peaks are predicted for torch's allocator as it is by default"
        " or with expandable_segments:True alone"
    )


def cuts_large_blocks(environ: Mapping[str, str]) -> bool:
    """Whether smaller requests are cut from a large free block: not from one above
    ``max_split_size_mb``, where that is set."""
    return not any("max_split_size_mb" in text for text in _read(environ).values())


def _expandable(environ: Mapping[str, str]) -> bool | None:
    """None where something else is set, or two variables say different things."""
    if _uncached(environ):
        return None
    told = {_told(text) for text in _read(environ).values()} or {False}
    return told.pop() if len(told) == 1 else None


def _read(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set and that the installed torch reads, as they are."""
    found = {name: environ[name] for name in (NEW_NAME, OLD_NAME) if environ.get(name, "").strip()}
    if NEW_NAME in found:  # the version is looked up for nobody else
        version = re.match(r"(\d+)\.(\d+)", installed_versions("torch").get("torch", ""))
        if version and (int(version[1]), int(version[2])) < NEW_SINCE:
            del found[NEW_NAME]
    return found


def _uncached(environ: Mapping[str, str]) -> bool:
    return bool(environ.get(UNCACHED, "").strip())


def _told(text: str) -> bool | None:
    options = {part.strip() for part in text.split(",")}
    options = {part for part in options if part and not part.startswith(_HOST)}
    if options <= {_FIXED}:
        return False
    return True if options == {_EXPANDABLE} else None
