"""The search for what fits: right for any function, in few tries for nearly linear ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_multigpu.planning.search import FURTHER, LOOKS, Fit, climbed, last_that_fits

HIGHEST = 200_000


def tried(spare: Callable[[int], int], *, highest: int = HIGHEST) -> tuple[int, dict[int, bool]]:
    """The answer for what has ``spare(tokens)`` left, and what was tried on the way."""
    asked: dict[int, bool] = {}

    def fit(tokens: int) -> Fit:
        assert tokens not in asked
        assert 1 < tokens < highest
        left = spare(tokens)
        asked[tokens] = left >= 0
        return Fit(fits=left >= 0, spare_bytes=left)

    high = (highest, spare(highest))
    return last_that_fits(fit, (1, spare(1)), high, precision=256), asked


def enclosed(answer: int, asked: Mapping[int, bool], highest: int = HIGHEST) -> bool:
    """The answer fits, and what does not fit is as near above it as promised."""
    refused = min([highest, *(n for n, fits in asked.items() if not fits and n > answer)])
    return asked.get(answer, answer == 1) and refused - answer <= max(16, answer // 256)


@pytest.mark.parametrize("last", [2, 100, 5_000, 77_777, 199_000])
def test_a_line_takes_two_tries(last: int) -> None:
    answer, asked = tried(lambda n: (last - n) * 1_000_003)
    assert enclosed(answer, asked)
    assert answer <= last < answer + max(16, answer // 256)
    # Half the precision below the answer, and half above what then was found.
    assert len(asked) <= 2


@pytest.mark.parametrize(("precision", "step"), [(8, 16), (1024, 16), (1, 1), (256, 500)])
def test_the_precision_is_the_callers(precision: int, step: int) -> None:
    def fit(tokens: int) -> Fit:
        return Fit(fits=tokens <= 77_777, spare_bytes=77_777 - tokens)

    answer = last_that_fits(
        fit, (1, 77_776), (HIGHEST, 77_777 - HIGHEST), precision=precision, step=step
    )
    assert answer <= 77_777 < answer + max(step, answer // precision)


@pytest.mark.parametrize(
    ("spare", "tries"),
    [
        # Weights are loaded first: short contexts take no more than that.
        (lambda n: min(9_000_000_000, 12_000_000_000 - n * 750_000), 3),
        (lambda n: 5_000_000_000 - n * 10_000 - max(0, n - 50_000) * 500_000, 7),
        (lambda n: 4_000_000_000 - n * n, 7),
        (lambda n: 100_000_000 - isqrt(n * 10**12), 7),
        # A bend just before the answer: bisection takes 14.
        (lambda n: min(1_000_000_000, 12_000_000_000 - n * 750_000), 14),
    ],
)
def test_a_bent_line_takes_more(spare: Callable[[int], int], tries: int) -> None:
    answer, asked = tried(spare)
    assert spare(answer) >= 0 > spare(answer + max(16, answer // 256))
    assert len(asked) <= tries


def test_a_step_takes_little_more_than_bisection() -> None:
    """The allocator gives everything back at once: gigabytes are left, or some bytes lack."""
    answer, asked = tried(lambda n: 5_000_000_000 if n <= 113_000 else -60_000_000)
    assert enclosed(answer, asked)
    assert len(asked) <= 15


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
)
def test_right_for_steps_and_dents(levels: list[int], length: int, noise: int, slope: int) -> None:
    def spare(n: int) -> int:
        if n in (1, HIGHEST):
            return 10**10 if n == 1 else -(10**10)
        level = levels[n // length % len(levels)]
        return level + n * 2_654_435_761 % (noise + 1) - slope * n

    answer, asked = tried(spare)
    assert enclosed(answer, asked)
    bisection = 14  # of 200,000 down to 16
    assert len(asked) <= 7 + bisection


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
    assert len(asked) <= 7 + 6


def test_neighbours_need_no_try() -> None:
    assert tried(lambda n: 5 - n, highest=17) == (1, {})
    answer, asked = tried(lambda n: 5 - n, highest=18)
    assert len(asked) == 1
    assert enclosed(answer, asked, 18)


@pytest.mark.parametrize(
    ("islands", "answer"),
    [
        ([], 5120),
        ([5140], 5140),
        ([5160, 5180], 5180),
        # Each one found is looked above in its turn.
        ([5200, 5280], 5280),
        ([5220], 5120),
    ],
)
def test_what_fits_a_little_above_is_taken(islands: list[int], answer: int) -> None:
    asked = []

    def fit(tokens: int) -> Fit:
        asked.append(tokens)
        return Fit(fits=tokens in islands, spare_bytes=0)

    assert climbed(fit, 5120, below=6000, precision=256) == answer
    beyond = answer + answer // FURTHER + 1
    assert asked == [*range(5140, answer + 20 * LOOKS + 1, 20), beyond]


def test_nothing_is_asked_from_the_bound_on() -> None:
    asked = []

    def fit(tokens: int) -> Fit:
        asked.append(tokens)
        return Fit(fits=True, spare_bytes=0)

    assert climbed(fit, 100, below=133, precision=256) == 132
    assert climbed(fit, 100, below=132, precision=256) == 129
    assert climbed(fit, 100, below=116, precision=256) == 112
    assert climbed(fit, 100, below=106, precision=256) == 100
    assert asked == [116, 132, 116, 122, 129, 106, 112]


def test_what_is_five_percent_above_the_answer_does_not_fit() -> None:
    def fit(tokens: int) -> Fit:
        return Fit(fits=tokens <= 1000 or 1049 <= tokens <= 1052, spare_bytes=0)

    # Its neighbours do not fit, 1051 does; nothing does at 1104.
    assert climbed(fit, 1000, below=2000, precision=256) == 1051
    assert not fit(1051 + 1051 // FURTHER + 1).fits
    # The end is not asked about.
    assert climbed(fit, 1000, below=1051, precision=256) == 1000
