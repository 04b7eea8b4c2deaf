"""Caps that make a planner come out as wanted: found by running it, in the form that is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_multigpu.planning.max_memory import max_memory_for_auto
from pytest_multigpu.planning.partition import place_groups, units
from pytest_multigpu.records.automap import Planner
from pytest_multigpu.records.plan import Architecture, DeviceMap, MaxMemory, auto_call
from pytest_multigpu.units import GIB, MIB, parse_size

Make = Callable[..., Architecture]


class Greedy:
    """A planner like transformers': fills GPU after GPU, blocks in order, then the CPU.

    :param share: of each cap that it fills; of a block's bytes that it reckons with.
    :param most: of one GPU but the last, whatever its cap is.
    """

    def __init__(
        self, model: Architecture, *, share: float = 1.0, sizes: float = 1.0, most: int = 1 << 60
    ) -> None:
        self.model, self.share, self.sizes, self.most = model, share, sizes, most
        self.offers: list[MaxMemory] = []

    def __call__(self, caps: MaxMemory) -> DeviceMap:
        self.offers.append(dict(caps))
        gpus = list(caps)
        left = []
        for gpu in gpus:
            cap = caps[gpu]
            size = cap if isinstance(cap, int) else parse_size(cap, what="a cap")
            left.append(self.share * (size if gpu == gpus[-1] else min(size, self.most)))
        placed: dict[str, int | str] = {}
        at = 0
        for block in self.model.blocks:
            need = block.weights_bytes * self.sizes
            while at < len(gpus) and left[at] < need:
                at += 1
            placed[block.name] = gpus[at] if at < len(gpus) else "cpu"
            if at < len(gpus):
                left[at] -= need
        return placed


def spread(model: Architecture, *counts: int) -> dict[str, int | str]:
    """So many layers on each GPU: embeddings first, norm and head last."""
    return place_groups(model, units(model), counts)


def test_whole_gib_that_give_the_placement(make_llama: Make) -> None:
    model, target = make_llama(), spread(make_llama(), 19, 21, 21, 19)
    planner = Greedy(model)
    caps = max_memory_for_auto(model, target, planner)
    # 1.6 GiB a layer, 2.0 GiB of embeddings or head: half a layer more, rounded up. 22 layers
    # would take 35.1 GiB.
    assert caps == {0: "33GiB", 1: "35GiB", 2: "35GiB", 3: "34GiB"}
    assert planner.offers[-1] == caps
    assert planner(caps) == target


def test_one_gpu_of_which_the_planner_fills_nine_tenths(make_llama: Make) -> None:
    model = make_llama("8bit")
    caps = max_memory_for_auto(model, spread(model, 80), Greedy(model, share=0.9))
    # 67.7 GiB of weights are nine tenths of 75.2.
    assert caps is not None
    assert caps[0] in ("76GiB", "77GiB")


def test_the_last_of_many_gpus_is_given_what_it_needs(make_llama: Make) -> None:
    model = make_llama("4bit")
    target = spread(model, 30, 50)
    caps = max_memory_for_auto(model, target, Greedy(model, share=0.8, sizes=0.9))
    assert caps is not None
    assert Greedy(model, share=0.8, sizes=0.9)(caps) == target


def test_mib_or_bytes_where_no_whole_gib_does(make_llama: Make) -> None:
    small = {"hidden": 1024, "intermediate": 4096, "heads": 8, "kv_heads": 8, "vocab": 1000}
    model = make_llama(layers=8, **small)
    target = spread(model, 2, 6)
    caps = max_memory_for_auto(model, target, Greedy(model))
    assert caps is not None
    assert isinstance(caps[0], str)
    assert caps[0].endswith("MiB")
    assert Greedy(model)(caps) == target
    tiny = {"hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 4, "head_dim": 16}
    model = make_llama(layers=8, **tiny, vocab=100)
    target = spread(model, 2, 6)
    caps = max_memory_for_auto(model, target, Greedy(model))
    assert caps is not None
    assert isinstance(caps[0], int)
    assert Greedy(model)(caps) == target


@pytest.mark.parametrize("more", [0, 1, 8])
def test_a_planner_that_takes_no_more_on_a_gpu(more: int, make_llama: Make) -> None:
    """transformers': an even share and a buffer, whatever the cap."""
    model = make_llama("4bit")
    planner = Greedy(model, most=8 * GIB)
    most = list(planner({0: 100 * GIB, 1: 100 * GIB}).values()).count(0) - 1
    planner.offers.clear()
    found = max_memory_for_auto(model, spread(model, most + more, 80 - most - more), planner)
    assert (found is None) is bool(more)
    # That it cannot be is known at once.
    assert (len(planner.offers) == 1) is bool(more)


class KeepsBack(Greedy):
    """As transformers: of each GPU but the last so many layers' room, and a share at most."""

    def __init__(self, model: Architecture, layers: float, *, most: int = 1 << 60) -> None:
        super().__init__(model)
        self.back = int(layers * model.blocks[1].weights_bytes)
        self.even = most

    def __call__(self, caps: MaxMemory) -> DeviceMap:
        *others, last = caps
        sizes = {
            gpu: cap if isinstance(cap, int) else parse_size(cap, what="a cap")
            for gpu, cap in caps.items()
        }
        less = {gpu: min(sizes[gpu], self.even) - self.back for gpu in others}
        return super().__call__({**less, last: caps[last]})


@pytest.mark.parametrize("layers", [-0.4, 0, 1.7, 3, 7.5])
def test_caps_are_what_is_placed_and_what_the_planner_keeps_back(
    layers: float, make_llama: Make
) -> None:
    """Found without knowing what that is, in few runs, and no larger than a layer more."""
    model = make_llama()
    layer = model.blocks[1].weights_bytes
    for most in (1 << 60, 31 * layer + model.blocks[0].weights_bytes + int(layers * layer) - 1):
        planner = KeepsBack(model, layers, most=most)
        caps = max_memory_for_auto(model, spread(model, 30, 50), planner)
        assert caps is not None
        first = parse_size(str(caps[0]), what="a cap")
        least = model.blocks[0].weights_bytes + 30 * layer + int(layers * layer)
        assert least <= first <= least + layer + GIB
        # 81.7 GiB, and half a layer.
        assert caps[1] == "83GiB"
        assert len(planner.offers) <= 12


@pytest.mark.parametrize(
    "stubborn",
    [
        lambda _: {"": 0},
        lambda _: {"": 1},
        lambda _: {"": 7},
        lambda _: {},
        lambda _: {"": "cpu"},
        lambda caps: {"": 0 if parse_size(str(caps[0]), what="") > GIB else 1},
    ],
)
def test_a_planner_that_never_agrees(stubborn: Planner, make_llama: Make) -> None:
    model = make_llama("4bit", layers=8)
    asked = 0

    def planner(caps: MaxMemory) -> DeviceMap:
        nonlocal asked
        asked += 1
        return stubborn(
            {gpu: f"{cap}B" if isinstance(cap, int) else cap for gpu, cap in caps.items()}
        )

    assert max_memory_for_auto(model, spread(model, 4, 4), planner) is None
    assert asked < 150


def test_every_block_counts_but_a_rotary_embedding(make_llama: Make) -> None:
    model = make_llama(layers=4)
    rotary = replace(model.blocks[0], name="model.rotary_emb", kind="other", weights_bytes=0)
    model = replace(model, blocks=(*model.blocks, rotary))
    target = spread(model, 2, 2)
    assert target["model.rotary_emb"] == 0

    def but(**elsewhere: int | str) -> Planner:
        moved = {name.replace("__", "."): place for name, place in elsewhere.items()}
        return lambda caps: {**Greedy(model)(caps), **moved}

    assert max_memory_for_auto(model, target, but(model__rotary_emb=1)) is not None
    assert max_memory_for_auto(model, target, but(model__rotary_emb="cpu")) is None
    assert max_memory_for_auto(model, target, but(lm_head="disk")) is None
    assert max_memory_for_auto(model, target, but(lm_head=0)) is None
    assert max_memory_for_auto(model, target, but(model__embed_tokens=1)) is None
    torn = {"model__layers__1__mlp": 1}
    assert max_memory_for_auto(model, target, but(**torn)) is None


@pytest.mark.parametrize(("share", "sizes"), [(1.0, 0.1), (0.25, 1.0), (1.0, 3.0)])
def test_a_planner_that_reckons_otherwise_is_followed(
    share: float, sizes: float, make_llama: Make
) -> None:
    """Steps of a layer's bytes are then too long, or too short."""
    model = make_llama("4bit")
    target = spread(model, 25, 35, 20)
    planner = Greedy(model, share=share, sizes=sizes)
    caps = max_memory_for_auto(model, target, planner)
    assert caps is not None
    assert planner(caps) == target


def test_only_a_placement_on_gpus_has_caps(make_llama: Make) -> None:
    model = make_llama(layers=4)
    for place in ("cpu", "disk"):
        target = {**spread(model, 4), "lm_head": place}
        assert max_memory_for_auto(model, target, Greedy(model)) is None
    assert max_memory_for_auto(model, {b.name: "cpu" for b in model.blocks}, Greedy(model)) is None


def test_a_gpu_that_holds_nothing_is_not_named(make_llama: Make) -> None:
    model = make_llama(layers=8)
    caps = max_memory_for_auto(model, spread(model, 4, 0, 4), Greedy(model))
    assert caps is not None
    assert sorted(caps) == [0, 2]


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 79), max_size=5, unique=True),
    share=st.floats(0.7, 1.0),
    sizes=st.floats(0.8, 1.1),
)
def test_what_is_found_is_what_the_planner_does(
    make_llama: Make, cuts: list[int], share: float, sizes: float
) -> None:
    """Any placement that a greedy planner can make is found."""
    model = make_llama("4bit")
    ends = [0, *sorted(cuts), 80]
    target = spread(model, *(b - a for a, b in pairwise(ends)))
    planner = Greedy(model, share=share, sizes=sizes)
    caps = max_memory_for_auto(model, target, planner)
    assert caps is not None
    assert planner(caps) == target
    assert len(planner.offers) <= 30 * len(caps)


def test_the_call_can_be_pasted() -> None:
    assert auto_call({0: "36GiB", 2: 512 * MIB}) == (
        'from_pretrained(..., device_map="auto", max_memory={0: "36GiB", 2: 536870912})'
    )
