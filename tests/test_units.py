from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_multigpu.errors import UsageError
from pytest_multigpu.units import GIB, gib, human_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("40GiB", 42_949_672_960),
        ("40GB", 40_000_000_000),
        ("512MiB", 536_870_912),
        ("0B", 0),
        ("1.5 GiB", 1_610_612_736),
        (" 2gib ", 2_147_483_648),
        ("0.1TB", 100_000_000_000),
        ("0.3B", 0),
        ("3KiB", 3_072),
        ("3KB", 3_000),
        ("3MB", 3_000_000),
        ("2TiB", 2_199_023_255_552),
        ("2TB", 2_000_000_000_000),
        ("999999999999999999B", 999_999_999_999_999_999),
        ("0.000000000000001TB", 0),
        ("0.001000000000000TB", 1_000_000_000),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text, what="x") == size_bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("40", "gpu(vram=): '40' has no unit; write 40GiB or 40MiB"),
        (
            "40GBit",
            "gpu(vram=): '40GBit' has an unknown unit; "
            "known: B, KiB, MiB, GiB, TiB, KB, MB, GB, TB",
        ),
        ("", "gpu(vram=): '' is not a size; write it like 40GiB or 512MiB"),
        ("-1GiB", "gpu(vram=): '-1GiB' is not a size; write it like 40GiB or 512MiB"),
        ("GiB", "gpu(vram=): 'GiB' is not a size; write it like 40GiB or 512MiB"),
        ("1e3GiB", "gpu(vram=): '1e3GiB' is not a size; write it like 40GiB or 512MiB"),
        (
            "1000000000000000000B",
            "gpu(vram=): '1000000000000000000B' is not a size; write it like 40GiB or 512MiB",
        ),
        (
            "0.0000000000000001TB",
            "gpu(vram=): '0.0000000000000001TB' is not a size; write it like 40GiB or 512MiB",
        ),
        ("٤GiB", "gpu(vram=): '٤GiB' is not a size; write it like 40GiB or 512MiB"),
    ],
)
def test_wrong_sizes(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, what="gpu(vram=)")
    assert str(caught.value) == message


@given(st.text(max_size=60))
def test_any_text_gives_a_size_or_one_line(text: str) -> None:
    try:
        assert parse_size(text, what="x") >= 0
    except UsageError as error:
        assert str(error).startswith("x: ")


@given(st.integers(0, 1 << 50))
def test_whole_bytes_survive(size_bytes: int) -> None:
    assert parse_size(f"{size_bytes}B", what="x") == size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (GIB, "1.0 GiB"),
        (GIB - 1, "1024.0 MiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 20) - 1, "1048575 B"),
        (-2 * GIB, "-2.0 GiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert human_size(size_bytes) == text


def test_gib_with_digits() -> None:
    assert gib(85_899_345_920) == "80.0 GiB"
    assert gib(85_520_809_984, 2) == "79.65 GiB"
    assert gib(0.5 * GIB, 0) == "0 GiB"
