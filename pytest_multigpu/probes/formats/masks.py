"""The ``mask`` object that the project's own JSON and ``probe_config.json`` share.

Imports :mod:`.jsonfile` and :mod:`..probe`.
"""

from __future__ import annotations

from typing import Any

from ..probe import TokenMask
from .jsonfile import Fields


def read_mask(fields: Fields) -> TokenMask:
    """``fields``' key ``mask``; without it the assistant's texts alone.

    :raises ProbeFileError: not an object, an unknown key, or a wrong value.
    """
    values = fields.values.get("mask", {})
    if not isinstance(values, dict):
        fields.fail("mask", "is not an object")
    mask = Fields(fields.path, values, "mask.")
    mask.known("roles", "left", "right", "exclude_last")
    return TokenMask(
        roles=mask.texts("roles", ("assistant",)),
        left=mask.integer("left", 0),
        right=mask.integer("right", 0),
        exclude_last=mask.integer("exclude_last", 0),
    )


def described(mask: TokenMask) -> dict[str, Any]:
    """The object that :func:`read_mask` reads."""
    return {
        "roles": list(mask.roles),
        "left": mask.left,
        "right": mask.right,
        "exclude_last": mask.exclude_last,
    }
