"""How the environment sets torch's caching allocator. Imports nothing of the package.

Read as ``c10/core/AllocatorConfig.cpp`` does: ``PYTORCH_ALLOC_CONF``, or
``PYTORCH_CUDA_ALLOC_CONF`` for torch before 2.9 and where the other is not set.
"""

from __future__ import annotations

from collections.abc import Mapping

CONFIGURED_BY = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
_EXPANDABLE, _FIXED = "expandable_segments:True", "expandable_segments:False"
_HOST = "pinned_"
"""Such options are about the host's memory."""


def expandable_segments(environ: Mapping[str, str]) -> bool:
    """Whether segments grow, and nothing else about the allocator is set."""
    return _expandable(environ) is True


def unlike_planned(environ: Mapping[str, str]) -> str | None:
    """A sentence if torch's allocator is set to go by rules that no plan follows; None if it is
    as by default or has expandable segments."""
    if _expandable(environ) is not None:
        return None
    found = [
        f"{name}={environ[name]}" for name in (*CONFIGURED_BY, UNCACHED) if _set(environ, name)
    ]
    return (
        f"{' '.join(found)}: peaks are predicted for torch's allocator as it is by default"
        " or with expandable_segments:True alone"
    )


def cuts_large_blocks(environ: Mapping[str, str]) -> bool:
    """Whether smaller requests are cut from a large free block: not from one above
    ``max_split_size_mb``, where that is set."""
    return not any("max_split_size_mb" in environ.get(name, "") for name in CONFIGURED_BY)


def _expandable(environ: Mapping[str, str]) -> bool | None:
    """None where something else is set, or two variables say different things."""
    if _set(environ, UNCACHED):
        return None
    told = {_told(environ[name]) for name in CONFIGURED_BY if _set(environ, name)} or {False}
    return told.pop() if len(told) == 1 else None


def _told(text: str) -> bool | None:
    options = {part.strip() for part in text.split(",")}
    options = {part for part in options if part and not part.startswith(_HOST)}
    if options <= {_FIXED}:
        return False
    return True if options == {_EXPANDABLE} else None


def _set(environ: Mapping[str, str], name: str) -> bool:
    return bool(environ.get(name, "").strip())
