"""What the fuzz tests share: JSON of every kind, files that almost hold it, and the one rule."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import event, settings
from hypothesis import strategies as st

from pytest_multigpu.errors import MultiGpuError

Result = TypeVar("Result")

FUZZ = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci-fuzz"))
"""Applied to each test by name: a profile loaded here would reach every other test too."""


def result_or_one_line(call: Callable[[], Result], *, begins: str = "") -> Result | None:
    """The result, or None after one clear line. Any other exception fails the test."""
    try:
        result = call()
    except MultiGpuError as error:
        text = str(error)
        assert text.strip()
        assert text.startswith(begins)
        assert text.isprintable()  # one line, and nothing that a terminal would obey
        text.encode("utf-8")
        event("one line")
        return None
    event("a result")
    return result


TEXT = st.text(max_size=12) | st.sampled_from(
    ["\0", "\ud800", "\n", "a\r\nb", "\u2028", "\x1b[2J", "..", "/", "a" * 5000, "~nobody-here/x"]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, -(10**400)])
    | st.floats()
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
_JUNK = st.sampled_from(
    ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, '"\\ud800"', "\0", ""]
) | st.text(max_size=4)


@st.composite
def files(draw: st.DrawFn, data: st.SearchStrategy[Any]) -> bytes:
    """A JSON file: as it should be, spliced with junk, damaged byte by byte, or noise."""
    text = json.dumps(draw(data))
    how = draw(st.sampled_from(["whole"] * 6 + ["spliced", "damaged", "noise"]))
    if how == "noise":
        return draw(st.binary(max_size=60))
    if how == "spliced":
        at, until = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        text = text[:at] + draw(_JUNK) + text[until:]
    content = text.encode("utf-8", "surrogatepass")
    return draw(damaged(content)) if how == "damaged" and content else content


@st.composite
def damaged(draw: st.DrawFn, content: bytes, first: int = 1 << 20) -> bytes:
    """``content`` with one to four places changed, cut or filled up among its first bytes."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(first, len(changed))))
        changed[at : at + draw(st.integers(0, 8))] = draw(
            st.binary(max_size=8)
            | st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\x80", b"\x00\x00\x00\x80"])
        )
    return bytes(changed)


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """``value`` as it is, or with one part, however deep, replaced, removed or renamed."""
    if draw(st.integers(0, 5)) == 0:
        return value
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        how = draw(st.sampled_from(["inside", "inside", "inside", "removed", "renamed"]))
        rest = {name: part for name, part in value.items() if name != key}
        if how == "removed":
            return rest
        if how == "renamed":
            return {**rest, draw(TEXT): value[key]}
        return {**value, key: draw(altered(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 2)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(altered(value[at])), *value[at + 1 :]]
    return draw(JSON)
