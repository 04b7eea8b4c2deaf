"""One Linear alone: what it holds at its worst moment and what stays, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pytest_multigpu.planning.allocator import Allocator
from pytest_multigpu.planning.costs import HOPPER
from pytest_multigpu.planning.linears import Linears
from pytest_multigpu.records.plan import Architecture
from pytest_multigpu.units import MIB

Make = Callable[..., Architecture]
T = 2048
WIDE = T * 28672 * 2


def test_columns_kept_in_16_bit_are_held_beside_the_product(make_llama: Make) -> None:
    linears = Linears(make_llama("8bit", layers=1))
    a, plain = Allocator(), Allocator()
    kept = 8192 // 4
    found = linears.run(a, HOPPER, T, 28672, 8192, outliers=0.25)
    assert found.size == linears.run(plain, HOPPER, T, 28672, 8192).size == WIDE
    # Outlier columns of the input and of the weight, in 16 bit, beside the int32 product and both
    # its forms.
    assert a.peak_allocated == plain.peak_allocated + T * kept * 2 + 28672 * kept * 2
    assert a.allocated == found.size


def test_looking_for_outliers_takes_something_where_there_are_some(make_llama: Make) -> None:
    """Few rows: the worst moment is before the product."""
    linears = Linears(make_llama("8bit", layers=1))
    half, forms = T * 8192 * 2, T * 8192 * (1 + 1)
    costs = replace(HOPPER, int8_outlier_search_bytes=64 * MIB)
    for outliers, searching in ((0.0, 0), (1 / 8192, 64 * MIB)):
        a = Allocator()
        linears.run(a, costs, T, 8, 8192, outliers=outliers)
        assert a.peak_allocated == half + forms + max(T * 8192 * 2, searching)


def test_the_weights_of_kept_columns_are_in_fp32_twice_for_a_moment(make_llama: Make) -> None:
    """One token: everything else is small."""
    a, kept = Allocator(), 4096
    Linears(make_llama("8bit", layers=1)).run(a, HOPPER, 1, 28672, 8192, outliers=0.5)
    # The input's int8 form and its kept columns; the weight's, as stored and wide.
    assert a.peak_allocated == 8192 + kept * 2 + 28672 * kept * (1 + 4 + 4)


def test_an_int8_linear_alone(make_llama: Make) -> None:
    """Few rows: the worst moment is before the product."""
    model = make_llama("8bit", layers=1)
    for dtype, half in (("bfloat16", T * 8192 * 2), ("float16", 0)):
        a = Allocator()
        out = Linears(replace(model, dtype=dtype)).run(a, HOPPER, T, 8, 8192)
        # The fp16 copy, its int8 form, magnitudes, mask.
        assert a.peak_allocated == half + T * 8192 * (1 + 2 + 1)
        assert a.allocated == out.size == T * 8 * 2


def test_an_nf4_linear_alone(make_llama: Make) -> None:
    a, linears = Allocator(), Linears(make_llama("4bit", layers=1))
    few = linears.run(a, HOPPER, 5, 4096, 8192)  # of a shape like down's, see nf4.py
    assert a.peak_allocated == few.size == 5 * 4096 * 2
    many = linears.run(a, HOPPER, 17, 4096, 8192)
    assert many.size == 17 * 4096 * 2
    assert a.peak_allocated == few.size + many.size + 4096 * 8192 * 2
    assert a.allocated == few.size + many.size


def test_a_16_bit_linear_takes_its_output_alone(make_llama: Make) -> None:
    a = Allocator()
    out = Linears(make_llama(layers=1)).run(a, HOPPER, T, 4096, 8192)
    assert a.peak_allocated == a.allocated == out.size == T * 4096 * 2
