"""What to rent: rows fit, are sorted by price, and the numbers follow from each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from pytest_multigpu.planning import peaks, rent
from pytest_multigpu.planning.balance import balanced_plan
from pytest_multigpu.planning.barred import runs_on
from pytest_multigpu.planning.catalogue import GpuType, find
from pytest_multigpu.planning.costs import SPARE_SHARE, costs_for
from pytest_multigpu.planning.partition import place_groups, units
from pytest_multigpu.planning.rent import NEVER, by_price, fewest, rent_table, tokens_per_second
from pytest_multigpu.planning.replay import replay
from pytest_multigpu.planning.simulate import idle_machine, simulate
from pytest_multigpu.planning.use import Use
from pytest_multigpu.records.plan import Architecture, Plan, Tier
from pytest_multigpu.records.rent import RentRow
from pytest_multigpu.units import GIB, MIB

Make = Callable[..., Architecture]


def test_the_table(make_llama: Make) -> None:
    tiers: dict[Tier, Architecture] = {tier: make_llama(tier) for tier in ("16bit", "8bit", "4bit")}
    rows = rent_table(tiers, context_tokens=4096, batch=1)
    by = {(row.gpu, row.tier): row for row in rows}
    assert by["H100", "16bit"].count == 2
    assert by["H200", "16bit"].count == 1
    assert by["A6000", "4bit"].spec == "1xA6000"
    assert by["H100", "8bit"].count == 1
    assert ("T4", "4bit") not in by  # no bfloat16
    assert [row.price_usd_hour for row in rows] == sorted(row.price_usd_hour for row in rows)
    for row in rows:
        assert row.headroom_bytes >= 0
        a_token = row.price_usd_hour / 3600 / row.tokens_per_second
        assert row.usd_per_million_tokens == pytest.approx(a_token * 1e6)


def test_speeds_are_near_the_measured_ones(make_llama: Make) -> None:
    # Measured, batch 1: 16 bit 10.0 on 4 x H100 and 12.4 on one H200; nf4 9.1, int8 2.3.
    h100, h200 = find("H100"), find("H200")
    assert h100 is not None
    assert h200 is not None
    assert tokens_per_second(make_llama(), h100, 4) == pytest.approx(10.0, rel=0.1)
    assert tokens_per_second(make_llama(), h200, 1) == pytest.approx(12.4, rel=0.1)
    assert tokens_per_second(make_llama("4bit"), h100, 4) == pytest.approx(9.1, rel=0.1)
    assert tokens_per_second(make_llama("8bit"), h100, 4) == pytest.approx(2.3, rel=0.1)


def test_slow_memory_sets_the_speed(make_llama: Make) -> None:
    l4 = find("L4")
    assert l4 is not None
    read = 141_107_412_992 - 2_101_346_304
    assert tokens_per_second(make_llama(), l4, 8) == pytest.approx(300e9 * 0.8 / read)


def test_what_a_card_can_compute(make_llama: Make) -> None:
    v100, t4 = find("V100"), find("T4")
    assert v100 is not None
    assert t4 is not None
    half = make_llama("8bit", size=4)
    assert not runs_on(v100.capability, half)
    assert runs_on(t4.capability, half)
    assert not runs_on(t4.capability, make_llama())


def small(make_llama: Make, tier: Tier = "16bit", **other: int) -> Architecture:
    shape = {"layers": 6, "hidden": 2048, "intermediate": 8192, "heads": 16, "kv_heads": 4}
    return make_llama(tier, **{**shape, "vocab": 4000, **other})


def test_a_row_in_numbers(make_llama: Make) -> None:
    model = small(make_llama)
    card = GpuType(
        key="C", name="Card", total_bytes=4 * GIB, bandwidth_gb_s=100, price_usd_hour=0.5
    )
    (row,) = rent_table({"16bit": model}, context_tokens=512, batch=3, catalogue=(card,))
    read = model.weights_bytes - model.blocks[0].weights_bytes
    read += 3 * 512 * sum(block.kv_bytes_per_token for block in model.blocks)
    alone = 1 / (read / (100e9 * 0.8))  # 10**9 bytes a second, four fifths of them in practice
    assert (row.gpu, row.count, row.tier, row.free_bytes) == ("C", 1, "16bit", card.free_bytes)
    assert row.tokens_per_second == pytest.approx(3 * alone, rel=1e-12)
    assert (row.price_usd_hour, row.price_guessed) == (0.5, None)
    (dated,) = rent_table(
        {"16bit": model}, context_tokens=512, batch=3,
        catalogue=(replace(card, price_guessed="2026-11"),),
    )  # fmt: skip
    assert dated == replace(row, price_guessed="2026-11")
    assert row.usd_per_million_tokens == pytest.approx(0.5 / (3 * alone * 3600) * 1e6)
    used = replay(
        model,
        {block.name: 0 for block in model.blocks},
        {0: costs_for(None)},
        context_tokens=512,
        batch=3,
    )
    assert row.peak_bytes == used[0].peaks.worst_bytes


def card(free: int) -> GpuType:
    return GpuType(
        key="C",
        name="Card",
        total_bytes=free + 1,
        reserved_bytes=1,
        bandwidth_gb_s=100,
        price_usd_hour=1.0,
    )


def worst(used: Mapping[int, Use]) -> int:
    return max(use.peaks.worst_bytes for use in used.values())


@pytest.mark.parametrize("grows", [False, True])
def test_three_cards_do_where_even_shares_would_take_four(grows: bool, make_llama: Make) -> None:
    """32 sequences of 8,000 tokens take more on the first GPU, which gets fewer layers."""
    model = small(make_llama, layers=8, intermediate=1024, kv_heads=8, vocab=1000)
    machine = replace(simulate("3x80GiB"), expandable_segments=grows)
    balanced = balanced_plan(model, machine, 8000, 32)
    assert balanced is not None
    peak = max(device.peak_bytes for device in balanced.devices)
    for even in ([3, 3, 2], [3, 2, 3]):
        used = replay(
            model,
            place_groups(model, units(model), even),
            dict.fromkeys(range(3), costs_for(None, expandable_segments=grows)),
            context_tokens=8000,
            batch=32,
        )
        assert worst(used) > peak * 1.04

    def row(free: int) -> RentRow:
        (found,) = rent_table(
            {"16bit": model}, context_tokens=8000, batch=32, catalogue=(card(free),),
            expandable_segments=grows,
        )  # fmt: skip
        return found

    assert row(peak).count == 3
    assert row(peak).peak_bytes <= peak
    assert row(peak * 96 // 100).count == 4


@pytest.mark.parametrize(("gpu", "context"), [("A6000", 8192), ("L40S", 2048)])
def test_balanced_fits_on_what_is_offered_and_not_on_one_fewer(
    gpu: str, context: int, make_llama: Make
) -> None:
    model, found = make_llama(), find(gpu)
    assert found is not None
    (row,) = rent_table({"16bit": model}, context_tokens=context, batch=8, catalogue=(found,))

    def plan(count: int) -> Plan:
        made = balanced_plan(model, simulate(f"{count}x{gpu}"), context, 8)
        assert made is not None
        return made

    assert plan(row.count).fits
    assert not plan(row.count - 1).fits
    # That of a split that fits, which the balanced one can only better.
    peak = max(device.peak_bytes for device in plan(row.count).devices)
    assert peak <= row.peak_bytes <= row.free_bytes


def test_what_is_dearer_takes_no_time(make_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest row is there before anything is replayed for a dearer one."""
    replays: list[int] = []
    real = rent._need

    def counted(*arguments: Any) -> Any:
        replays.append(arguments[1])
        return real(*arguments)

    monkeypatch.setattr(rent, "_need", counted)
    model = small(make_llama)
    cheap = replace(card(8 * GIB), key="A", price_usd_hour=0.4)
    (alone,) = rent_table({"16bit": model}, context_tokens=512, batch=1, catalogue=(cheap,))
    replays.clear()
    less = card(alone.peak_bytes * 85 // 100)
    less = replace(less, key="B", price_usd_hour=0.3)
    dear = replace(card(8 * GIB), key="D", price_usd_hour=2.0, capability=(9, 0))
    types = (dear, less, cheap)
    offers = by_price(model, context_tokens=512, batch=1, catalogue=types)
    first = next(offers)
    assert (first.gpu, first.count) == ("A", 1)
    assert replays == [1]  # of B and of A, which take the same
    assert [(row.gpu, row.count) for row in offers] == [("B", 2), ("D", 1)]
    assert replays == [1, 2, 1]
    tiers: dict[Tier, Architecture] = {"16bit": model, "4bit": small(make_llama, "4bit")}
    table = rent_table(tiers, context_tokens=512, batch=1, catalogue=types, most=2)
    assert [(row.gpu, row.tier) for row in table] == [
        ("B", "4bit"), ("A", "16bit"), ("A", "4bit"), ("B", "16bit"),
    ]  # fmt: skip


def test_no_machine_has_more_positions(make_llama: Make) -> None:
    tiers: dict[Tier, Architecture] = {"16bit": replace(small(make_llama), max_context=4096)}
    assert rent_table(tiers, context_tokens=4096, batch=1)
    assert rent_table(tiers, context_tokens=4097, batch=1) == ()


def test_near_the_limit_a_row_must_fit_as_a_plan_must(make_llama: Make) -> None:
    """In 8 bit wherever outliers begin: here that takes more than the replay without them."""
    model = small(make_llama, "8bit")
    on_one: dict[str, int | str] = {block.name: 0 for block in model.blocks}
    used = replay(model, on_one, {0: costs_for(None)}, context_tokens=2048, batch=4)

    def count(free: int) -> int:
        (found,) = rent_table(
            {"8bit": model}, context_tokens=2048, batch=4, catalogue=(card(free),)
        )
        return found.count

    assert count(worst(used) * 2) == 1
    assert count(worst(used)) == 2


def test_the_fewest_cards_that_hold_it_to_the_byte(make_llama: Make) -> None:
    """As a plan of that very machine says, down to the last byte that does."""
    model = small(make_llama)

    def count(free: int) -> int:
        rows = rent_table({"16bit": model}, context_tokens=512, batch=1, catalogue=(card(free),))
        return rows[0].count if rows else NEVER

    def fits(gpus: int, free: int) -> bool:
        plan = balanced_plan(model, idle_machine([card(free)] * gpus, ""), 512, 1)
        return plan is not None and plan.fits

    assert count(8 * GIB) == 1
    assert count(700 * MIB) == NEVER
    for gpus in (1, 2, 3):
        too_few, enough = 700 * MIB, 8 * GIB
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if count(middle) <= gpus:
                enough = middle
            else:
                too_few = middle
        assert (count(enough), count(too_few)) == (gpus, gpus + 1)
        assert fits(gpus, enough)
        assert not fits(gpus, too_few)


def test_what_has_no_price_or_cannot_run_is_left_out(make_llama: Make) -> None:
    model = small(make_llama)
    free = GpuType(key="F", name="F", total_bytes=8 * GIB, bandwidth_gb_s=100)
    old = replace(free, key="O", price_usd_hour=0.1, capability=(7, 5))
    fine = replace(free, key="B", price_usd_hour=0.3, capability=(8, 0))
    same = replace(free, key="A", price_usd_hour=0.3, capability=(8, 0))
    tiers: dict[Tier, Architecture] = {"16bit": model, "4bit": small(make_llama, "4bit")}
    rows = rent_table(tiers, context_tokens=64, batch=1, catalogue=(free, old, fine, same))
    assert [(row.gpu, row.tier) for row in rows] == [
        ("A", "16bit"),
        ("A", "4bit"),
        ("B", "16bit"),
        ("B", "4bit"),
    ]


@pytest.mark.parametrize(
    ("capability", "tier", "size", "runs"),
    [
        (None, "8bit", 2, True),
        ((8, 0), "16bit", 2, True),
        ((7, 9), "16bit", 2, False),
        ((7, 5), "8bit", 4, True),
        ((7, 4), "8bit", 4, False),
        ((7, 0), "4bit", 4, True),
        ((6, 0), "4bit", 4, True),
        ((5, 2), "4bit", 4, False),
        ((5, 2), "16bit", 4, True),
        ((5, 2), "cpu", 2, True),
    ],
)
def test_compute_capabilities_at_the_limit(
    capability: tuple[int, int] | None, tier: Tier, size: int, runs: bool, make_llama: Make
) -> None:
    assert runs_on(capability, small(make_llama, tier, size=size)) is runs


def test_speed_by_reading_or_by_launching(make_llama: Make) -> None:
    model = small(make_llama)
    slow = GpuType(key="S", name="S", total_bytes=GIB, bandwidth_gb_s=1)
    fast = replace(slow, bandwidth_gb_s=1e6)
    table = model.blocks[0].weights_bytes
    read = model.weights_bytes - table
    assert tokens_per_second(model, slow, 1) == pytest.approx(0.8e9 / read, rel=1e-12)
    head = replace(model.blocks[-1], weights_bytes=0, tied_to="model.embed_tokens")
    tied = replace(model, blocks=(*model.blocks[:-1], head))
    # The head's table is read, and is the embeddings': nothing is left out.
    whole = tied.weights_bytes
    assert tokens_per_second(tied, slow, 1) == pytest.approx(0.8e9 / whole, rel=1e-12)
    # 6 layers of 40 kernels; one GPU needs no hooks.
    python = 3.3e-3 + 6 * 40 * 25e-6
    assert tokens_per_second(model, fast, 1) == pytest.approx(1 / python)
    assert tokens_per_second(model, fast, 2) == pytest.approx(1 / (1.3 * python))


def test_the_cache_is_read_at_every_step(make_llama: Make) -> None:
    model = small(make_llama)
    slow = GpuType(key="S", name="S", total_bytes=GIB, bandwidth_gb_s=1)
    weights = model.weights_bytes - model.blocks[0].weights_bytes
    cache = sum(block.kv_bytes_per_token for block in model.blocks)
    assert cache == 6 * 2 * 4 * 128 * 2
    for context, batch in ((0, 1), (1000, 1), (1000, 8)):
        found = tokens_per_second(model, slow, 1, context_tokens=context, batch=batch)
        read = weights + context * batch * cache
        assert found == pytest.approx(batch * 0.8e9 / read, rel=1e-12)
    # A sliding window is all that its layers keep.
    windowed = replace(model, blocks=tuple(replace(b, kv_window=100) for b in model.blocks))
    found = tokens_per_second(windowed, slow, 1, context_tokens=1000)
    assert found == pytest.approx(0.8e9 / (weights + 100 * cache), rel=1e-12)


def test_counts_that_cannot_do_are_passed_over() -> None:
    # 10 GiB to share, 1 GiB of its own for each, nine tenths of which are counted.
    assert fewest(10 * GIB, GIB, 4 * GIB) == 4
    assert fewest(10 * GIB, 0, 10 * GIB + 1) == 1
    assert fewest(10 * GIB, 0, 10 * GIB) == 2
    assert fewest(GIB, 10 * GIB, 9 * GIB) == fewest(GIB, 10 * GIB, 8 * GIB) > 1000


def test_more_cards_than_layers_help_no_more(make_llama: Make) -> None:
    model = small(make_llama, layers=2)

    def rows(free: int) -> list[tuple[int, int]]:
        table = rent_table({"16bit": model}, context_tokens=16, batch=1, catalogue=(card(free),))
        return [(row.count, row.peak_bytes) for row in table]

    ((_, one),) = rows(8 * GIB)
    ((count, two),) = rows(one - 1)
    assert count == 2
    assert rows(two) == [(2, two)]
    assert rows(two - 1) == []


def cards(make: Make, *, free: int, context: int = 512, **shape: int) -> list[RentRow]:
    """The row of a card with so many free bytes."""
    model = small(make, "16bit", **shape)
    return list(
        rent_table({"16bit": model}, context_tokens=context, batch=1, catalogue=(card(free),))
    )


@pytest.mark.parametrize(("layers", "offered"), [(16, [16]), (17, [])])
def test_sixteen_cards_are_offered_and_no_more(
    layers: int, offered: list[int], make_llama: Make
) -> None:
    model = small(make_llama, layers=layers)
    used = replay(
        model,
        place_groups(model, units(model), [1] * layers),
        dict.fromkeys(range(layers), costs_for(None)),
        context_tokens=512,
        batch=1,
    )
    # With a layer on each; fewer cards have two on one of them.
    need = max(use.peaks.worst_bytes for use in used.values())
    assert [row.count for row in cards(make_llama, free=need, layers=layers)] == offered
    assert cards(make_llama, free=need - 1, layers=layers) == []


def test_cards_are_spread_by_the_cache_as_well(make_llama: Make) -> None:
    """Of twelve layers the last four have nearly all of the cache."""
    model = small(make_llama, "16bit", layers=12, hidden=512, intermediate=512, kv_heads=16)
    model = replace(
        model,
        blocks=tuple(
            replace(b, kv_bytes_per_token=64) if b.layer is not None and b.layer < 8 else b
            for b in model.blocks
        ),
    )

    def row(free: int) -> RentRow:
        (found,) = rent_table(
            {"16bit": model}, context_tokens=131_072, batch=1, catalogue=(card(free),)
        )
        return found

    two = row(row(80 * GIB).peak_bytes * 85 // 100)
    assert two.count == 2
    halves = []
    for first in range(1, 12):
        used = replay(
            model,
            place_groups(model, units(model), [first, 12 - first]),
            dict.fromkeys(range(2), costs_for(None)),
            context_tokens=131_072,
            batch=1,
        )
        halves.append(max(use.peaks.worst_bytes for use in used.values()))
    # As low as any split, but for what activations alone can tell.
    assert min(halves) <= two.peak_bytes < min(halves) * 1.02
    assert two.peak_bytes < halves[5] * 0.95


@pytest.mark.parametrize("context", [512, 40_000])
def test_the_peak_is_that_of_the_fullest_card_spread_by_weights_and_cache(
    context: int, make_llama: Make
) -> None:
    """A head of 5 layers' weights, and a cache that outweighs it."""
    shape = {"layers": 9, "vocab": 120_000}
    model = small(make_llama, "16bit", **shape)
    (one,) = cards(make_llama, free=80 * GIB, context=context, **shape)
    (row,) = cards(make_llama, free=one.peak_bytes - 1, context=context, **shape)
    assert row.count == 2
    groups = units(model)
    sizes = [sum(b.weights_bytes + b.kv_bytes_per_token * context for b in g) for g in groups]
    # Of two equal cards the larger half is smallest there.
    split = min(range(10), key=lambda n: max(sum(sizes[:n]), sum(sizes[n:])))
    used = replay(
        model,
        place_groups(model, groups, [split, 9 - split]),
        dict.fromkeys(range(2), costs_for(None)),
        context_tokens=context,
        batch=1,
    )
    peaks = [use.peaks.worst_bytes for use in used.values()]
    assert len(set(peaks)) == 2
    assert row.peak_bytes == max(peaks)


def test_the_probe_counts_as_in_a_plan(make_llama: Make) -> None:
    """What a probe keeps is the most here, and the same machine's plan has it."""
    shape = {"layers": 4, "hidden": 8192, "intermediate": 16384, "heads": 4, "kv_heads": 1}
    model = small(make_llama, "16bit", **shape)
    (row,) = cards(make_llama, free=80 * GIB, context=6_000, **shape)
    on_one: dict[str, int | str] = {block.name: 0 for block in model.blocks}
    peaks = replay(model, on_one, {0: costs_for(None)}, context_tokens=6_000, batch=1)[0].peaks
    assert row.peak_bytes == peaks.probe_bytes > replace(peaks, probe_bytes=0).worst_bytes


def test_a_tier_that_does_not_run_or_fit_does_not_hide_the_next(make_llama: Make) -> None:
    tiers: dict[Tier, Architecture] = {
        tier: small(make_llama, tier, size=4, layers=12) for tier in ("16bit", "8bit", "4bit")
    }
    old = GpuType(
        key="O", name="O", total_bytes=1600 * MIB, reserved_bytes=0, bandwidth_gb_s=100,
        price_usd_hour=0.1, capability=(7, 0),
    )  # fmt: skip
    large = replace(tiers["16bit"].blocks[0], weights_bytes=2 * GIB)
    tiers["16bit"] = replace(tiers["16bit"], blocks=(large, *tiers["16bit"].blocks[1:]))
    rows = rent_table(tiers, context_tokens=64, batch=1, catalogue=(old,))
    # float32 embeddings of 2 GiB fit on none, int8 needs compute capability 7.5.
    assert [row.tier for row in rows] == ["4bit"]


def test_something_is_kept_spare_as_in_a_plan(
    make_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = cards(make_llama, free=8 * GIB)
    assert cards(make_llama, free=one.peak_bytes)[0].count == 1
    monkeypatch.setattr(peaks, "SPARE_SHARE", SPARE_SHARE)
    assert cards(make_llama, free=one.peak_bytes)[0].count == 2
    assert cards(make_llama, free=one.peak_bytes * 256 // 255 + 1)[0].count == 1


@pytest.mark.parametrize(("context", "batch"), [(512, 1), (4096, 8), (60_000, 1)])
def test_passing_counts_over_finds_what_trying_all_finds(
    context: int, batch: int, make_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers: dict[Tier, Architecture] = {
        tier: small(make_llama, tier, layers=24, kv_heads=16) for tier in ("16bit", "4bit")
    }
    sizes = [
        GpuType(
            key=f"{size}", name="C", total_bytes=size * GIB // 4, reserved_bytes=0,
            bandwidth_gb_s=100, price_usd_hour=1.0,
        )
        for size in (5, 6, 7, 8, 10, 12, 16, 20, 28)
    ]  # fmt: skip

    def rows() -> list[tuple[str, str]]:
        table = rent_table(tiers, context_tokens=context, batch=batch, catalogue=tuple(sizes))
        return [(row.spec, row.tier) for row in table]

    found = rows()
    monkeypatch.setattr(rent, "fewest", lambda *_: 0)
    assert found == rows()
    assert any(not row.startswith("1x") for row, _ in found)
