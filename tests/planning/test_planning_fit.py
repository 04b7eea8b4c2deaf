"""The largest context, and the remedies: texts word for word, numbers as the plans have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest

from pytest_multigpu.errors import UsageError
from pytest_multigpu.planning.balance import balanced
from pytest_multigpu.planning.fit import choose_tier, largest_context
from pytest_multigpu.planning.peaks import Predictor, predict
from pytest_multigpu.planning.remedies import remedies
from pytest_multigpu.records.machine import Gpu, Machine
from pytest_multigpu.records.plan import Architecture, DeviceMap, Plan, Tier
from pytest_multigpu.units import GIB, MIB, gib

Make = Callable[..., Architecture]
FREED = "with nothing else on them would do with --gpu-placement=balanced: free their memory"
SHAPE = {
    "layers": 8,
    "hidden": 2048,
    "intermediate": 8192,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 128,
    "vocab": 4000,
}


def machine(*free_mib: int, total_mib: int = 4096, reserved_mib: int = 96) -> Machine:
    gpus = tuple(
        Gpu(
            index=i,
            cuda_index=i,
            uuid=f"GPU-{i}",
            name="Card",
            total_bytes=total_mib * MIB,
            free_bytes=free * MIB,
            used_bytes=(total_mib - reserved_mib - free) * MIB,
            reserved_bytes=reserved_mib * MIB,
        )
        for i, free in enumerate(free_mib)
    )
    return Machine(gpus=gpus, visible=tuple(range(len(gpus))))


def plan(
    model: Architecture,
    on: Machine,
    placed: DeviceMap,
    *,
    context: int = 1000,
    batch: int = 1,
    placement: str = "auto",
) -> Plan:
    return predict(
        model,
        placed,
        on,
        context_tokens=context,
        batch=batch,
        weights="synthetic",
        placement=placement,
    )


def peak(found: Plan, at: int = 0) -> str:
    device = found.devices[at]
    index = device.device.removeprefix("cuda:")
    return f"GPU {index} would peak at {gib(device.peak_bytes)} of {gib(device.limit_bytes)}"


@pytest.mark.parametrize(("free_mib", "batch"), [(2048, 1), (2600, 3), (1900, 1), (4000, 1)])
def test_the_largest_context_is_exact_to_what_is_promised(
    free_mib: int, batch: int, make_llama: Make
) -> None:
    model, on = make_llama(**SHAPE), machine(free_mib)
    longest = largest_context(model, {"": 0}, on, batch=batch)
    assert longest > 100
    assert plan(model, on, {"": 0}, context=longest, batch=batch).fits
    more = longest + max(16, longest // 256)
    assert not plan(model, on, {"": 0}, context=more, batch=batch).fits


def test_no_context_is_longer_than_the_models(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    short = replace(model, max_context=300)
    assert largest_context(short, {"": 0}, machine(4000)) == 300
    tiny = replace(make_llama("cpu", **SHAPE), max_context=None)
    assert largest_context(tiny, {"": "cpu"}, Machine()) == 1_048_576


def test_what_is_known_to_fit_is_the_least_answer(make_llama: Make) -> None:
    """A longer context may fit where a shorter does not: segments of the allocator just do."""
    model = make_llama("4bit", **SHAPE)
    fits = {}
    for free in range(1200, 1600, 80):
        on = machine(free)
        plans = Predictor(model, {"": 0}, on)
        found = largest_context(model, {"": 0}, on)
        above = range(found + 1, found + found // 16 + 64, 3)
        islands = [n for n in above if plans.fit(context_tokens=n, batch=1).fits]
        for known in islands[-1:]:
            fits[known] = largest_context(model, {"": 0}, on, known=known)
            assert plans.fit(context_tokens=fits[known], batch=1).fits
    assert fits  # else this shows nothing
    assert all(found >= known for known, found in fits.items())
    assert largest_context(replace(model, max_context=50), {"": 0}, on, known=60) == 60


def test_one_token_that_just_fits(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    need = plan(model, machine(4000), {"": 0}, context=1).devices[0].peak_bytes
    one = machine(4000)
    for free, tokens in ((need, 1), (need - 1, 0)):
        gpu = replace(one.gpus[0], free_bytes=free)
        found = largest_context(replace(model, max_context=1), {"": 0}, replace(one, gpus=(gpu,)))
        assert found == tokens


def test_the_refused_tiers_are_told(make_llama: Make) -> None:
    on = machine(900)
    made: dict[Tier, Plan] = {
        tier: plan(make_llama(tier, **SHAPE), on, {"": 0}) for tier in ("16bit", "8bit", "4bit")
    }
    chosen, refused = choose_tier(made.__getitem__)
    assert chosen is None
    assert [one.architecture.tier for one in refused] == ["16bit", "8bit", "4bit"]


def test_balanced_is_the_first_remedy_and_says_what_it_takes(make_llama: Make) -> None:
    model, on = make_llama(**SHAPE), machine(1700, 1700)
    refused = plan(model, on, {"": 0})
    placed = balanced(model, on, context_tokens=1000, batch=1)
    spread = plan(model, on, placed)
    fullest = max((0, 1), key=lambda at: spread.devices[at].peak_bytes)
    found = remedies(refused, on)
    # Nothing to rent, and nothing to free.
    assert found == (f"--gpu-placement=balanced fits: {peak(spread, fullest)}",)
    # The same plan from balanced itself has no such remedy.
    again = remedies(replace(refused, placement="balanced"), on)
    assert not [text for text in again if text.startswith("--gpu-placement")]


def test_a_shorter_context_is_named_as_found(make_llama: Make) -> None:
    model, on = make_llama(**SHAPE), machine(2048)
    refused = plan(model, on, {"": 0}, context=60_000, batch=2)
    longest = largest_context(model, {"": 0}, on, batch=2)
    found = remedies(refused, on)
    assert found[0] == f"--gpu-context={longest} is the longest that fits as placed"
    offloaded = plan(model, on, {"": 0, "lm_head": "cpu"}, context=60_000)
    texts = [text for text in remedies(offloaded, on) if "--gpu-context" in text]
    assert len(texts) == 1
    tokens = int(texts[0].split()[1].removeprefix("--gpu-context="))
    anew = plan(model, on, balanced(model, on, context_tokens=tokens, batch=1), context=tokens)
    assert anew.fits
    assert texts == [f"--gpu-placement=balanced --gpu-context={tokens} fits: {peak(anew)}"]


def test_a_lower_tier_on_the_same_machine(make_llama: Make) -> None:
    tiers: dict[Tier, Architecture] = {
        tier: make_llama(tier, **SHAPE) for tier in ("16bit", "8bit", "4bit")
    }
    # Free for nf4 alone: int8 needs 100 MiB more, and some of them for outliers.
    peaks = {
        tier: plan(model, machine(4000), {"": 0}).devices[0].peak_bytes
        for tier, model in tiers.items()
    }
    assert peaks["4bit"] < peaks["8bit"] < peaks["16bit"]
    room_for_outliers: dict[Tier, int] = {"8bit": 48, "4bit": 0}
    for tier, outliers in room_for_outliers.items():
        on = machine(peaks[tier] * 256 // 255 // MIB + 1 + outliers)
        refused = plan(tiers["16bit"], on, {"": 0})
        lower = plan(tiers[tier], on, {"": 0})
        found = remedies(refused, on, architectures=tiers)
        texts = [text for text in found if text.startswith("--gpu-tier")]
        assert texts == [f"--gpu-tier={tier} --gpu-placement=balanced fits: {peak(lower)}"]
    without = remedies(plan(tiers["16bit"], on, {"": 0}), on)
    assert not [text for text in without if text.startswith("--gpu-tier")]


def test_busy_cards_are_to_be_freed(make_llama: Make) -> None:
    model, on = make_llama(**SHAPE), machine(600, 1000)
    found = remedies(plan(model, on, {"": 0}), on)
    assert found[-1] == f"1 x Card {FREED}"


def test_what_to_rent_is_the_fewest_of_the_largest_card(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    on = machine(1230, total_mib=1326)
    found = remedies(plan(model, on, {"": 0}), on)
    three = machine(1230, 1230, 1230, total_mib=1326)
    counts = [
        n
        for n in range(1, 17)
        if plan(
            model,
            (cards := machine(*[1230] * n, total_mib=1326)),
            balanced(model, cards, context_tokens=1000, batch=1),
        ).fits
    ]
    assert counts[0] == 3
    spread = plan(model, three, balanced(model, three, context_tokens=1000, batch=1))
    fullest = max(range(3), key=lambda at: spread.devices[at].peak_bytes)
    assert found == (f"rent 3 x Card: with --gpu-placement=balanced {peak(spread, fullest)}",)
    assert remedies(plan(model, on, {"": 0}), on, most_gpus=3) == found
    assert remedies(plan(model, on, {"": 0}), on, most_gpus=2, catalogue=()) == ()
    # A smaller card beside it is not what would be rented.
    small = replace(on.gpus[0], index=1, cuda_index=1, name="Small", total_bytes=GIB, free_bytes=0)
    both = Machine(gpus=(small, replace(on.gpus[0], index=0)), visible=(1, 0))
    assert remedies(plan(model, both, {"": 1}), both)[-1].startswith("rent 3 x Card: ")


def test_without_a_gpu_there_is_nothing_to_say(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    refused = plan(model, Machine(), {"": 0})
    assert refused.reasons == ("GPU 0 is not there: CUDA sees 0 of the map's GPUs",)
    assert remedies(refused, Machine(), architectures={"4bit": make_llama("4bit")}) == ()


@pytest.mark.parametrize("free_mib", [(2200, 1300), (1300, 2200), (1500, 1900), (2400, 1150)])
def test_the_fullest_gpu_is_named_not_the_largest(
    free_mib: tuple[int, int], make_llama: Make
) -> None:
    model, on = make_llama(**SHAPE), machine(*free_mib)
    placed = balanced(model, on, context_tokens=1000, batch=1)
    spread = plan(model, on, placed)
    assert spread.fits
    shares = [Fraction(device.peak_bytes, device.limit_bytes) for device in spread.devices]
    fullest = shares.index(max(shares))
    refused = plan(model, on, {"": free_mib.index(min(free_mib))})
    assert remedies(refused, on)[0] == f"--gpu-placement=balanced fits: {peak(spread, fullest)}"


def test_a_context_of_one_token_is_still_an_offer(make_llama: Make) -> None:
    model = replace(make_llama(**SHAPE), max_context=3)
    need = plan(model, machine(4000), {"": 0}, context=1).devices[0].peak_bytes
    gpu = replace(machine(4000).gpus[0], free_bytes=need)
    on = Machine(gpus=(gpu,), visible=(0,))
    long = plan(model, on, {"": 0}, context=50_000)
    offers = [text for text in remedies(long, on) if text.startswith("--gpu-context=")]
    longest = largest_context(model, {"": 0}, on)
    assert longest >= 1
    assert offers == [f"--gpu-context={longest} is the longest that fits as placed"]
    # Weights alone are too much: no context is offered.
    small = Machine(gpus=(replace(gpu, free_bytes=need // 2),), visible=(0,))
    none = remedies(plan(model, small, {"": 0}, context=50_000), small)
    assert not [text for text in none if text.startswith("--gpu-context=")]


def test_gpus_without_a_free_byte_are_to_be_freed(make_llama: Make) -> None:
    model, on = make_llama(**SHAPE), machine(0, 0)
    with pytest.raises(UsageError, match="CUDA sees no GPU with free memory"):
        balanced(model, on, context_tokens=1000, batch=1)
    found = remedies(plan(model, on, {"": 0}), on)
    assert found == (f"1 x Card {FREED}",)


def test_one_token_is_found_where_two_are_too_many(make_llama: Make) -> None:
    """Of 40,000 sequences a token is 0.6 GiB of cache."""
    model, batch = make_llama(**SHAPE), 40_000
    need = [
        plan(model, machine(4000), {"": 0}, context=n, batch=batch).devices[0].peak_bytes
        for n in (1, 2)
    ]
    gpu = replace(machine(4000).gpus[0], free_bytes=(need[0] + need[1]) // 2)
    on = Machine(gpus=(gpu,), visible=(0,))
    assert largest_context(model, {"": 0}, on, batch=batch) == 1
    offers = remedies(plan(model, on, {"": 0}, context=500, batch=batch), on)
    assert offers[0] == "--gpu-context=1 is the longest that fits as placed"


def test_what_does_not_even_hold_the_weights_has_no_context(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    gpu = machine(4000).gpus[0]
    for free in (model.weights_bytes - 1, model.weights_bytes, model.weights_bytes + MIB):
        on = Machine(gpus=(replace(gpu, free_bytes=free),), visible=(0,))
        assert largest_context(model, {"": 0}, on) == 0
        assert largest_context(model, lambda _: {"": 0}, on) == 0
    assert largest_context(model, {"": 0, "lm_head": "cpu"}, machine(4000)) == 0
    assert largest_context(model, {"": 0}, Machine()) == 0


def test_layers_that_move_with_the_context(make_llama: Make) -> None:
    """Balanced anew for every context, it is at least as long as with any one map."""
    model, on = make_llama(**SHAPE), machine(1600, 1400)

    def spread(tokens: int) -> DeviceMap:
        return balanced(model, on, context_tokens=tokens, batch=1)

    longest = largest_context(model, spread, on)
    assert plan(model, on, spread(longest), context=longest).fits
    assert longest >= largest_context(model, spread(16), on) > 0
    more = longest + max(16, longest // 256)
    assert not plan(model, on, spread(more), context=more).fits


def test_the_first_tier_that_fits_and_what_was_refused(make_llama: Make) -> None:
    on = machine(1500)
    made: list[Tier] = []

    def plan_of(tier: Tier) -> Plan:
        made.append(tier)
        return plan(make_llama(tier, **SHAPE), on, {"": 0}, context=100)

    chosen, refused = choose_tier(plan_of)
    assert chosen is not None
    assert chosen.architecture.tier == "8bit"
    assert [one.architecture.tier for one in refused] == ["16bit"]
    assert made == ["16bit", "8bit"]


def test_nothing_is_said_of_a_plan_that_fits(make_llama: Make) -> None:
    model, on = make_llama(**SHAPE), machine(4000)
    assert remedies(plan(model, on, {"": 0}), on, architectures={"16bit": model}) == ()


def test_the_plans_own_tier_is_no_other(make_llama: Make) -> None:
    model, on = make_llama(**SHAPE), machine(1700, 1700)
    tiers: dict[Tier, Architecture] = {"16bit": model}
    found = remedies(plan(model, on, {"": 0}), on, architectures=tiers)
    assert len(found) == 1
    assert found[0].startswith("--gpu-placement=balanced fits: ")


def test_a_gpu_without_memory_beside_one_that_does_alone(make_llama: Make) -> None:
    model, on = make_llama(**SHAPE), machine(0, 4000)
    found = remedies(plan(model, on, {"": 0}), on)
    spread = plan(model, on, {"": 1})
    assert found == (f"--gpu-placement=balanced fits: {peak(spread)}",)


def test_cards_that_would_do_only_together_are_to_be_freed(make_llama: Make) -> None:
    """Two of the larger kind are not there: the smaller one is needed as well."""
    model = make_llama(**SHAPE)
    large, small = machine(1830, 0).gpus
    large = replace(large, total_bytes=1926 * MIB, free_bytes=300 * MIB, used_bytes=1530 * MIB)
    small = replace(small, total_bytes=1596 * MIB, free_bytes=300 * MIB, used_bytes=1200 * MIB)
    on = Machine(gpus=(large, replace(small, name="Small")), visible=(0, 1))
    refused = plan(model, on, {"": 0}, context=2000)
    assert remedies(refused, on) == (f"the GPUs {FREED}",)
    idle = on.idle()
    placed = balanced(model, idle, context_tokens=2000, batch=1)
    assert plan(model, idle, placed, context=2000).fits
    assert not plan(model, idle, {"": 0}, context=2000).fits


def test_as_many_idle_cards_as_are_there_need_not_be_rented(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    on = machine(600, 600, total_mib=1596)
    refused = plan(model, on, {"": 0})
    assert remedies(refused, on) == (f"2 x Card {FREED}",)
    alone = machine(600, total_mib=1596)
    assert remedies(plan(model, alone, {"": 0}), alone)[0].startswith("rent 2 x Card: ")


def test_sixteen_cards_are_proposed_and_no_more(make_llama: Make) -> None:
    model = make_llama(**{**SHAPE, "layers": 16})
    each = make_llama(**{**SHAPE, "layers": 1})
    # A layer on each; the first has the embeddings as well, the last the head.
    need = plan(each, machine(4000), {"": 0}).devices[0].peak_bytes

    def proposed(total: int) -> tuple[str, ...]:
        gpu = replace(machine(0).gpus[0], total_bytes=total, reserved_bytes=0, used_bytes=0)
        on = Machine(gpus=(gpu,), visible=(0,))
        return remedies(plan(model, on, {"": 0}), on, catalogue=())

    assert proposed(need)[0].startswith("rent 16 x Card: ")
    assert proposed(need - 64 * MIB) == ()


def test_a_gpu_that_cannot_be_read_is_not_what_is_rented(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    lost = replace(machine(0).gpus[0], total_bytes=0, reserved_bytes=0, problem="lost")
    on = Machine(gpus=(lost,), visible=(0,))
    assert remedies(plan(model, on, {"": 0}), on, catalogue=()) == ()
    (rent,) = remedies(plan(model, on, {"": 0}), on)
    assert rent.startswith("rent 1xRTX3090: with --gpu-placement=balanced GPU 0 would peak at ")
