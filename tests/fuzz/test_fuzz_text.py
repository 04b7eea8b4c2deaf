"""Fuzzed sizes, simulated machines and baseline rules."""

from __future__ import annotations

from fuzzing import FUZZ, result_or_one_line
from hypothesis import given
from hypothesis import strategies as st

from pytest_multigpu.judging.baseline_rule import parse_rule
from pytest_multigpu.planning.catalogue import CATALOGUE
from pytest_multigpu.planning.simulate import MAX_GPUS, simulate
from pytest_multigpu.units import parse_size

SMALL = st.integers(1, 16).map(str)
NUMBER = SMALL | st.integers(0, 200).map(str) | st.text("0123456789.-+e", max_size=30)
UNIT = st.sampled_from(["GiB", "gb", "MiB", "TB", "B", "KiB", "Gi", "", " GiB", "\u0131B"])
SIZE = st.builds(str.__add__, NUMBER, UNIT)
CARD = st.sampled_from([row.key for row in CATALOGUE]) | SIZE | st.text(max_size=8)
GROUP = st.builds(
    "{}{}{}".format, SMALL | NUMBER, st.sampled_from(["x", "X", "*", " x ", "", "xx"]), CARD
)
KIND = st.sampled_from(["peak", "load", "speed", "score", "", "x"])
TERM = st.builds(
    "{}{}{}".format,
    KIND,
    st.sampled_from([":", ":", ":", "", "::"]),
    st.lists(SIZE | SMALL.map("{}%".format) | SMALL.map("{}s".format) | NUMBER, max_size=2).map(
        "+".join
    ),
)


@FUZZ
@given(text=SIZE | st.text(max_size=60) | st.integers(1, 5000).map(lambda n: "9" * n + "GiB"))
def test_sizes(text: str) -> None:
    found = result_or_one_line(lambda: parse_size(text, what="--gpu-x"), begins="--gpu-x: ")
    assert found is None or (type(found) is int and found >= 0)


@FUZZ
@given(
    spec=GROUP
    | st.lists(GROUP, min_size=1, max_size=4).map("+".join)
    | st.text(max_size=40)
    | st.sampled_from(["1x" + " " * 3000 + "T4\n", "1xT4+" * 3000, "9999xT4", "1x" + "9" * 5000])
)
def test_specs(spec: str) -> None:
    machine = result_or_one_line(lambda: simulate(spec), begins="--gpu-simulate: ")
    if machine is not None:
        assert 1 <= len(machine.visible_gpus) <= MAX_GPUS
        assert all(gpu.free_bytes > 0 for gpu in machine.gpus)


@FUZZ
@given(text=TERM | st.lists(TERM, max_size=3).map(" ".join) | st.text(max_size=40))
def test_baseline_rules(text: str) -> None:
    rule = result_or_one_line(lambda: parse_rule(text), begins="--gpu-baseline-rule: ")
    if rule is not None:
        assert rule
        assert all(t.fraction >= 0 and t.absolute >= 0 for t in rule.values())
