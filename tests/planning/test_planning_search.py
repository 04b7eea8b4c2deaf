"""The search for what fits: right for any function, in few tries for nearly linear ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_multigpu.planning.search import Fit, last_that_fits

HIGHEST = 200_000


def tried(
    spare: Callable[[int], int], *, known: bool = True, highest: int = HIGHEST
) -> tuple[int, dict[int, bool]]:
    """The answer for what has ``spare(tokens)`` left, and what was tried on the way."""
    asked: dict[int, bool] = {}

    def fit(tokens: int) -> Fit:
        assert tokens not in asked
        assert 1 < tokens < highest
        left = spare(tokens)
        asked[tokens] = left >= 0
        return Fit(fits=left >= 0, spare_bytes=left)

    high = (highest, spare(highest) if known else None)
    return last_that_fits(fit, (1, spare(1)), high, precision=256), asked


def enclosed(answer: int, asked: Mapping[int, bool], highest: int = HIGHEST) -> bool:
    """The answer fits, and what does not fit is as near above it as promised."""
    refused = min([highest, *(n for n, fits in asked.items() if not fits and n > answer)])
    return asked.get(answer, answer == 1) and refused - answer <= max(16, answer // 256)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("last", [2, 100, 5_000, 77_777, 199_000])
def test_a_line_takes_few_tries(last: int, known: bool) -> None:
    answer, asked = tried(lambda n: (last - n) * 1_000_003, known=known)
    assert enclosed(answer, asked)
    assert answer <= last < answer + max(16, answer // 256)
    assert len(asked) <= (2 if known else 10)


def test_a_bent_line_takes_a_few_more() -> None:
    """Weights are loaded first: short contexts take no more than that."""
    answer, asked = tried(lambda n: min(9_000_000_000, 12_000_000_000 - n * 750_000))
    assert answer <= 16_000 < answer + max(16, answer // 256)
    assert len(asked) <= 5


def test_what_fits_to_the_last_byte_is_found() -> None:
    # One token of 1 GB: nothing is left to say where between 4 and 5.
    answer, asked = tried(lambda n: 0 if n < 70_000 else -1)
    assert enclosed(answer, asked)
    assert answer < 70_000


@settings(max_examples=300, deadline=None)
@given(
    levels=st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=12),
    length=st.integers(1, 40_000),
    noise=st.integers(0, 10**11),
    slope=st.integers(0, 10**7),
    known=st.booleans(),
)
def test_right_for_steps_and_dents(
    levels: list[int], length: int, noise: int, slope: int, known: bool
) -> None:
    def spare(n: int) -> int:
        if n in (1, HIGHEST):
            return 10**10 if n == 1 else -(10**10)
        level = levels[n // length % len(levels)]
        return level + n * 2_654_435_761 % (noise + 1) - slope * n

    answer, asked = tried(spare, known=known)
    assert enclosed(answer, asked)
    bisection = next(i for i in count() if HIGHEST >> i <= 16)
    assert len(asked) <= 3 * bisection


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(2, 999), st.booleans()), st.integers(-5, 5))
def test_right_where_the_estimate_is_wrong(fits: dict[int, bool], said: int) -> None:
    """Whatever is said to be left, only what fits is answered."""
    asked: dict[int, bool] = {}

    def fit(tokens: int) -> Fit:
        asked[tokens] = fits.get(tokens, tokens < 500)
        return Fit(fits=asked[tokens], spare_bytes=said)

    answer = last_that_fits(fit, (1, said), (1000, -said), precision=256)
    assert enclosed(answer, asked, 1000)
    assert len(asked) <= 3 * 6


def test_neighbours_need_no_try() -> None:
    assert tried(lambda n: 5 - n, highest=17) == (1, {})
    answer, asked = tried(lambda n: 5 - n, highest=18)
    assert len(asked) == 1
    assert enclosed(answer, asked, 18)
