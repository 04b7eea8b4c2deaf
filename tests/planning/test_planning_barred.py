"""What no memory mends: capabilities at their limits, contexts beyond the model's positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_multigpu.planning.barred import why_barred
from pytest_multigpu.planning.fit import largest_context
from pytest_multigpu.planning.peaks import Predictor
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.plan import Architecture, Plan, Tier

Make = Callable[..., Architecture]
SHAPE = {"layers": 2, "hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2, "vocab": 500}


def plan(model: Architecture, spec: str, *, context: int = 64, gpu: int = 0) -> tuple[Plan, bool]:
    """The plan on one GPU of the machine, and whether the short way agrees that it fits."""
    made = Predictor(model, {"": gpu}, simulate(spec))
    full = made.plan(context_tokens=context, batch=1, placement="balanced")
    return full, made.fit(context_tokens=context, batch=1).fits


@pytest.mark.parametrize(
    ("tier", "size", "spec", "reasons"),
    [
        ("16bit", 2, "1xA100", ()),
        (
            "16bit",
            2,
            "1xT4",
            ("bfloat16 needs compute capability 8.0 or newer; GPU 0 (Tesla T4) has 7.5",),
        ),
        ("8bit", 4, "1xT4", ()),
        (
            "8bit",
            4,
            "1xV100",
            (
                "LLM.int8 needs compute capability 7.5 or newer; "
                "GPU 0 (Tesla V100-SXM2-32GB) has 7.0",
            ),
        ),
        ("4bit", 4, "1xV100", ()),
        # Nothing is known of such a card.
        ("8bit", 2, "1x80GiB", ()),
    ],
)
def test_a_card_that_cannot_compute_is_a_reason(
    tier: Tier, size: int, spec: str, reasons: tuple[str, ...], make_llama: Make
) -> None:
    found, short = plan(make_llama(tier, size=size, **SHAPE), spec)
    assert found.reasons == reasons
    assert found.fits is short is (not reasons)
    assert found.devices[0].peak_bytes < found.devices[0].limit_bytes


def test_only_the_cards_that_are_used_count(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    assert plan(model, "1xH100+1xT4", gpu=0)[0].fits
    assert plan(model, "1xH100+1xT4", gpu=1)[0].reasons == (
        "bfloat16 needs compute capability 8.0 or newer; GPU 1 (Tesla T4) has 7.5",
    )


def test_at_most_four_cards_are_listed(make_llama: Make) -> None:
    cards = dict(enumerate(simulate("5xT4").gpus))
    each = ", ".join(f"GPU {i} (Tesla T4) has 7.5" for i in range(4))
    text = f"bfloat16 needs compute capability 8.0 or newer; {each}"
    assert why_barred(make_llama(**SHAPE), cards, 1) == (f"{text} and 1 more",)
    del cards[4]
    assert why_barred(make_llama(**SHAPE), cards, 1) == (text,)


def test_nf4_needs_pascal(make_llama: Make) -> None:
    card = simulate("1xV100").gpus[0]
    model = make_llama("4bit", size=4, **SHAPE)
    assert why_barred(model, {0: replace(card, capability=(6, 0))}, 1) == ()
    assert why_barred(model, {0: replace(card, name="M60", capability=(5, 2))}, 1) == (
        "nf4 needs compute capability 6.0 or newer; GPU 0 (M60) has 5.2",
    )


@pytest.mark.parametrize("tier", ["16bit", "cpu"])
def test_a_context_beyond_the_models_positions(tier: Tier, make_llama: Make) -> None:
    model = replace(make_llama(tier, **SHAPE), max_context=300)
    assert plan(model, "1xH100", context=300)[0].fits
    found, short = plan(model, "1xH100", context=301)
    assert not found.fits
    assert not short
    assert found.reasons == (
        "a small Llama has 300 positions (max_position_embeddings); 301 tokens were asked for",
    )
    assert largest_context(model, {"": 0}, simulate("1xH100")) == 300
    assert plan(replace(model, max_context=None), "1xH100", context=301)[0].fits


def test_no_memory_comes_last(make_llama: Make) -> None:
    found, _ = plan(make_llama(), "1xT4", context=200_000)
    assert [text.partition(" ")[0] for text in found.reasons] == [
        "bfloat16",
        "llama-3.3-70b",
        "GPU",
    ]
