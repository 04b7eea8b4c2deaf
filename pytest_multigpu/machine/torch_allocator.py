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
    if NEW_NAME not in _names() and _set(environ, NEW_NAME) and not _set(environ, OLD_NAME):
        return (
            f"{NEW_NAME}={environ[NEW_NAME]}: torch {installed_versions('torch')['torch']} does "
            f"not read it for CUDA; set {OLD_NAME}"
        )
    if _expandable(environ) is not None:
        return None
    found = [f"{name}={environ[name]}" for name in (*_names(), UNCACHED) if _set(environ, name)]
    return (
        f"{' '.join(found)}: peaks are predicted for torch's allocator as it is by default"
        " or with expandable_segments:True alone"
    )


def cuts_large_blocks(environ: Mapping[str, str]) -> bool:
    """Whether smaller requests are cut from a large free block: not from one above
    ``max_split_size_mb``, where that is set."""
    return not any("max_split_size_mb" in environ.get(name, "") for name in _names())


def _expandable(environ: Mapping[str, str]) -> bool | None:
    """None where something else is set, or two variables say different things."""
    if _set(environ, UNCACHED):
        return None
    told = {_told(environ[name]) for name in _names() if _set(environ, name)} or {False}
    return told.pop() if len(told) == 1 else None


def _names() -> tuple[str, ...]:
    """The variables that the installed torch reads; both if it cannot be told."""
    version = re.match(r"(\d+)\.(\d+)", installed_versions("torch").get("torch", ""))
    if version and (int(version[1]), int(version[2])) < NEW_SINCE:
        return (OLD_NAME,)
    return (NEW_NAME, OLD_NAME)


def _told(text: str) -> bool | None:
    options = {part.strip() for part in text.split(",")}
    options = {part for part in options if part and not part.startswith(_HOST)}
    if options <= {_FIXED}:
        return False
    return True if options == {_EXPANDABLE} else None


def _set(environ: Mapping[str, str], name: str) -> bool:
    return bool(environ.get(name, "").strip())
