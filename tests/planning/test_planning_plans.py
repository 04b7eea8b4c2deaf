"""A plan's numbers and reasons on hand-made GPUs, at the limit and a byte to either side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_multigpu.planning.allocator import OTHER_ORDERS, TOP_DOWN
from pytest_multigpu.planning.costs import (
    CPU,
    HOPPER,
    OTHER,
    OUTLIERS_FROM,
    TRAINED_OUTLIERS,
    Costs,
)
from pytest_multigpu.planning.peaks import Predictor, predict, room
from pytest_multigpu.planning.replay import Loaded, replay
from pytest_multigpu.records.machine import Gpu, Machine
from pytest_multigpu.records.plan import Architecture, DeviceMap, Plan, Tier
from pytest_multigpu.units import GIB, MIB

Make = Callable[..., Architecture]
SHAPE = {
    "layers": 4,
    "hidden": 1024,
    "intermediate": 4096,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 128,
    "vocab": 8000,
}
BARE = Costs(
    hardware="none",
    versions="",
    context_bytes=100 * MIB,
    module_bytes=10 * MIB,
    workspace_bytes=32 * MIB,
    dequantise_above_tokens=16,
)


def machine(*free: int, used: int = 0) -> Machine:
    gpus = tuple(
        Gpu(
            index=i,
            cuda_index=i,
            uuid=f"GPU-{i}",
            name="Card",
            total_bytes=80 * GIB,
            free_bytes=size,
            used_bytes=used,
        )
        for i, size in enumerate(free)
    )
    return Machine(gpus=gpus, visible=tuple(range(len(gpus))))


def plan(
    model: Architecture,
    on: Machine,
    placed: DeviceMap,
    *,
    context: int = 512,
    batch: int = 1,
    costs: dict[int, Costs] | None = None,
) -> Plan:
    return predict(
        model,
        placed,
        on,
        context_tokens=context,
        batch=batch,
        weights="synthetic",
        placement="p",
        costs=costs,
    )


def test_the_last_byte_that_fits(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    device = plan(model, machine(GIB * 8), {"": 0}).devices[0]
    exact = plan(model, machine(device.peak_bytes), {"": 0})
    assert exact.fits
    assert exact.devices[0] == replace(device, limit_bytes=device.peak_bytes)
    # Far below, it is the plan without limits that is reported.
    short = plan(model, machine(512 * MIB), {"": 0})
    assert not short.fits
    lacking = (device.peak_bytes - 512 * MIB) / GIB
    assert short.reasons == (
        f"GPU 0 lacks {lacking:.1f} GiB: it would peak at {device.peak_bytes / GIB:.1f} GiB of "
        "0.5 GiB free with 512 tokens x 1",
    )
    assert short.devices[0].peak_bytes == device.peak_bytes


@pytest.mark.parametrize(
    ("used", "words"), [(64 * MIB - 1, ""), (64 * MIB, "; 0.1 GiB are in use already")]
)
def test_memory_in_use_is_told_from_64_mib_on(used: int, words: str, make_llama: Make) -> None:
    found = plan(make_llama(**SHAPE), machine(512 * MIB, used=used), {"": 0}, batch=3)
    assert found.reasons[0].endswith(f" free with 512 tokens x 3{words}")


def test_the_worst_gpu_comes_first_and_a_missing_one_is_named(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    placed = {"": 0, "model.layers.1": 1, "model.layers.2": 2, "model.layers.3": 2}
    found = plan(model, machine(600 * MIB, 8 * GIB, 200 * MIB), placed)
    assert [reason.partition(" lacks ")[0] for reason in found.reasons] == ["GPU 2", "GPU 0"]
    found = plan(model, machine(8 * GIB), {"": 0, "model.layers.3": 1})
    assert not found.fits
    assert found.reasons == ("GPU 1 is not there: CUDA sees 1 of the map's GPUs",)
    assert found.devices[1].limit_bytes == 0


def test_layers_weights_and_cache_of_each_device(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    placed: DeviceMap = {
        **{"": 0, "model.layers.1": 1, "model.layers.2": 1},
        **{"lm_head": 2, "model.norm": "disk"},
    }
    found = plan(model, machine(*[8 * GIB] * 3), placed, context=100, batch=3)
    assert [(d.device, d.layers) for d in found.devices] == [
        ("cuda:0", (0, 3)),
        ("cuda:1", (1, 2)),
        ("cuda:2", None),
        ("disk", None),
    ]
    layer = model.blocks[1].weights_bytes
    assert found.devices[1].weights_bytes == 2 * layer
    assert found.devices[2].weights_bytes == 8000 * 1024 * 2
    cache = 100 * 3 * 2 * 256 * 2
    assert [d.kv_bytes for d in found.devices] == [2 * cache, 2 * cache, 0, 0]
    assert found.offloaded == ("model.norm",)
    assert found.reasons == ("1 block would go to disk: model.norm",)
    disk = found.devices[3]
    assert (disk.weights_bytes, disk.peak_bytes, disk.reserve_bytes) == (2048, 2048, 0)


@pytest.mark.parametrize(
    ("count", "listed"),
    [
        (4, "model.layers.0, model.layers.1, model.layers.2, model.layers.3"),
        (5, "model.layers.0, model.layers.1, model.layers.2, model.layers.3 and 1 more"),
        (6, "model.layers.0, model.layers.1, model.layers.2, model.layers.3 and 2 more"),
    ],
)
def test_four_offloaded_blocks_are_named(count: int, listed: str, make_llama: Make) -> None:
    model = make_llama(**{**SHAPE, "layers": 6})
    placed = {"": 0} | {f"model.layers.{i}": "cpu" for i in range(count)}
    found = plan(model, machine(8 * GIB), placed)
    assert found.reasons == (f"{count} blocks would go to the CPU: {listed}",)
    # Their cache stays on the GPU that runs them.
    cpu = found.devices[1]
    assert (cpu.kv_bytes, cpu.activation_bytes) == (0, 0)
    assert cpu.peak_bytes == cpu.weights_bytes == count * model.blocks[1].weights_bytes


def test_the_measured_costs_are_added_to_each_phase(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    placed = {block.name: 0 for block in model.blocks}
    nothing = replace(BARE, context_bytes=0, module_bytes=0)

    def use(costs: Costs) -> tuple[int, ...]:
        found = replay(model, placed, {0: costs}, context_tokens=512, batch=1)[0]
        peaks = found.peaks
        return (
            peaks.load_bytes,
            peaks.prefill_bytes,
            peaks.decode_bytes,
            peaks.probe_bytes,
            found.fixed_bytes,
            found.missing_bytes,
        )

    more = [a - b for a, b in zip(use(BARE), use(nothing), strict=True)]
    assert more == [100 * MIB, 110 * MIB, 110 * MIB, 110 * MIB, 110 * MIB, 0]
    assert use(nothing)[4] == 32 * MIB
    without = replay(model, placed, {0: BARE}, context_tokens=512, batch=1, probe=False)[0]
    assert without.peaks.probe_bytes == 0
    wider = replace(nothing, workspace_bytes=52 * MIB)
    grown = [a - b for a, b in zip(use(wider), use(nothing), strict=True)]
    assert grown[0] == 0
    assert grown[4] == 20 * MIB
    assert min(grown[1:4]) > 0


def test_given_costs_replace_the_table(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    on = machine(8 * GIB, 8 * GIB)
    placed = {"": 0, "model.layers.3": 1}
    plain, given = plan(model, on, placed), plan(model, on, placed, costs={1: BARE})
    assert plain.devices[0] == given.devices[0]
    less = OTHER.context_bytes + OTHER.module_bytes - 110 * MIB
    assert plain.devices[1].peaks.load_bytes - given.devices[1].peaks.load_bytes == (
        OTHER.context_bytes - 100 * MIB
    )
    assert plain.devices[1].peak_bytes - given.devices[1].peak_bytes <= less
    hopper = replace(on, gpus=tuple(replace(gpu, capability=(9, 0)) for gpu in on.gpus))
    assert plan(model, hopper, placed).devices == (
        plan(model, on, placed, costs={0: HOPPER, 1: HOPPER}).devices
    )


def test_cached_memory_is_given_back_before_it_is_refused(make_llama: Make) -> None:
    """Between what tensors need and what the allocator would like to keep there is room."""
    model = make_llama("8bit", **SHAPE)
    roomy = plan(model, machine(8 * GIB), {"": 0}, context=2048, batch=16)
    peak = roomy.devices[0].peak_bytes
    squeezed = [
        found
        for less in range(2, 400, 14)
        if (found := plan(model, machine(peak - less * MIB), {"": 0}, context=2048, batch=16)).fits
    ]
    assert squeezed
    assert all(one.devices[0].peak_bytes <= one.devices[0].limit_bytes for one in squeezed)
    assert all(one.devices[0].peak_bytes < peak for one in squeezed)
    assert all(one.reasons == () for one in squeezed)


@pytest.mark.parametrize("context", [1, 2, 16, 17, 18])
def test_short_contexts_have_a_prompt_and_a_step(context: int, make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    found = plan(model, machine(8 * GIB), {"": 0}, context=context)
    assert found.fits
    assert found.devices[0].kv_bytes == 4 * context * 2 * 256 * 2
    peaks = found.devices[0].peaks
    assert peaks.decode_bytes >= peaks.prefill_bytes > 0


def test_nothing_on_a_gpu_is_nothing_to_replay(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    placed: dict[str, int | str] = {block.name: "cpu" for block in model.blocks}
    assert replay(model, placed, {}, context_tokens=4, batch=1) == {}


def test_the_prompt_is_the_context_without_the_new_tokens(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    placed = {block.name: 0 for block in model.blocks}

    def peaks(context: int, new: int) -> tuple[int, int]:
        found = replay(model, placed, {0: BARE}, context_tokens=context, batch=4, new_tokens=new)[
            0
        ].peaks
        return found.prefill_bytes, found.probe_bytes

    assert peaks(4112, 16) == peaks(4608, 512)
    assert peaks(4112, 16) < peaks(4608, 16)
    # At least one token is the prompt, and at least one is new.
    assert peaks(2, 16) == peaks(2, 1) == peaks(2, 0)
    assert peaks(5000, 0) == peaks(5000, 1)
    assert peaks(5000, 6000) == peaks(5000, 4999)


def test_the_cpu_tier_holds_in_tensors_what_a_gpu_would(make_llama: Make) -> None:
    model = make_llama("cpu", **SHAPE)
    (cpu,) = plan(model, Machine(), {"": "cpu"}, context=300, batch=2).devices
    (gpu,) = replay(
        model, dict.fromkeys((b.name for b in model.blocks), 0), {0: CPU},
        context_tokens=300, batch=2,
    ).values()  # fmt: skip
    assert cpu.peak_bytes == gpu.allocated_peak_bytes
    assert cpu.kv_bytes == 4 * 300 * 2 * 2 * 256 * 2
    assert cpu.activation_bytes == cpu.peak_bytes - cpu.weights_bytes - cpu.kv_bytes > 0
    assert (cpu.reserve_bytes, cpu.limit_bytes, cpu.layers) == (0, 0, (0, 3))


@pytest.mark.parametrize("tier", ["16bit", "8bit", "4bit"])
@pytest.mark.parametrize("context", [1, 17, 600])
def test_whether_it_fits_is_told_without_a_plan_as_with_one(
    tier: Tier, context: int, make_llama: Make
) -> None:
    model = make_llama(tier, **{**SHAPE, "intermediate": 16384})
    peaks = plan(model, machine(8 * GIB), {"": 0}, context=context).devices[0].peaks
    limits = {
        peak + more
        for peak in (peaks.load_bytes, peaks.prefill_bytes, peaks.decode_bytes, peaks.probe_bytes)
        # Up to what is counted outside the allocator only once it generates.
        for more in (-MIB, -1, 0, 1, OTHER.module_bytes - 1, OTHER.module_bytes, 64 * MIB)
    }
    for limit in limits:
        found = Predictor(model, {"": 0}, machine(limit))
        expected = plan(model, machine(limit), {"": 0}, context=context)
        told = found.fit(context_tokens=context, batch=1)
        assert told.fits is expected.fits
        assert abs(told.spare_bytes - (limit - peaks.worst_bytes)) < 0.1 * limit
    placed: DeviceMap = {"": 0, "lm_head": "cpu"}
    offloaded = Predictor(model, placed, machine(8 * GIB)).fit(context_tokens=9, batch=1)
    assert not offloaded.fits


def test_every_context_is_asked_on_the_model_as_loaded(make_llama: Make) -> None:
    model = make_llama("8bit", **SHAPE)
    on = machine(*[GIB] * 2)
    placed = {"": 0, "model.layers.3": 1, "lm_head": 1}
    kept = Predictor(model, placed, on)
    for context in (900, 5, 900):
        asked = kept.plan(context_tokens=context, batch=2, placement="p")
        assert asked == plan(model, on, placed, context=context, batch=2)


@pytest.mark.parametrize(("context", "slack"), [(4096, False), (3000, True)])
def test_the_parts_of_a_gpus_peak_by_hand(context: int, slack: bool, make_llama: Make) -> None:
    """Reserve: context, kernels and workspace, or more where the allocator holds more."""
    model = make_llama(**SHAPE)
    device = plan(model, machine(8 * GIB), {"": 0}, context=context, costs={0: BARE}).devices[0]
    used = replay(
        model, {block.name: 0 for block in model.blocks}, {0: BARE}, context_tokens=context, batch=1
    )[0]
    assert device.peak_bytes == used.peaks.worst_bytes
    fixed, beyond = 142 * MIB, device.peak_bytes - used.allocated_peak_bytes
    assert (beyond > fixed) is slack
    activations = max(part.activations_bytes + part.logits_bytes for part in used.parts.values())
    assert device.activation_bytes == activations
    assert device.reserve_bytes == device.peak_bytes - sum(
        (device.weights_bytes, device.kv_bytes, activations)
    )
    assert device.reserve_bytes > fixed
    known = device.weights_bytes + device.kv_bytes + device.reserve_bytes
    assert device.activation_bytes == device.peak_bytes - known


def test_a_squeezed_gpu_has_no_slack_in_its_activations(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    roomy = plan(model, machine(8 * GIB), {"": 0}, context=4096).devices[0]
    fixed = OTHER.context_bytes + OTHER.module_bytes + OTHER.workspace_bytes
    seen = []
    for less in range(2, 400, 14):
        limit = roomy.peak_bytes - less * MIB
        found = plan(model, machine(limit), {"": 0}, context=4096)
        if found.fits:
            device = found.devices[0]
            seen.append(device.reserve_bytes)
            assert device.reserve_bytes >= fixed
            assert device.peak_bytes <= limit
            parts = device.weights_bytes + device.kv_bytes + device.activation_bytes
            assert parts + device.reserve_bytes == device.peak_bytes
    assert min(seen) < roomy.reserve_bytes


def test_equal_shortfalls_are_told_in_the_gpus_order(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    placed = {"": 3, "model.layers.1": 2, "model.layers.2": 1, "model.layers.3": 0}
    found = plan(model, machine(*[100 * MIB] * 3, 8 * GIB), placed)
    names = [reason.partition(" lacks ")[0] for reason in found.reasons]
    assert sorted(names[1:]) == names[1:]
    assert names == ["GPU 0", "GPU 1", "GPU 2"]
    lacks = [reason.partition(": it would")[0].partition(" lacks ")[2] for reason in found.reasons]
    assert len(set(lacks)) == 1


def test_after_a_missing_gpu_the_others_are_told(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    placed = {"": 1, "model.layers.3": 0}
    found = plan(model, machine(500 * MIB), placed)
    assert found.reasons[0] == "GPU 1 is not there: CUDA sees 1 of the map's GPUs"
    assert found.reasons[1].startswith("GPU 0 lacks ")
    assert len(found.reasons) == 2


def test_what_is_left_is_the_tightest_gpus(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    placed = {"": 0, "model.layers.3": 1}
    roomy = Predictor(model, placed, machine(8 * GIB, 8 * GIB))
    peaks = [device.peak_bytes for device in roomy.plan(
        context_tokens=512, batch=1, placement="p"
    ).devices]  # fmt: skip
    free = [peaks[0] + 3 * GIB, peaks[1] + GIB]
    left = Predictor(model, placed, machine(*free)).fit(context_tokens=512, batch=1).spare_bytes
    assert abs(left - GIB) < 64 * MIB
    # No GPU has nothing left either.
    cpu = Predictor(make_llama("cpu", **SHAPE), {"": "cpu"}, Machine())
    told = cpu.fit(context_tokens=512, batch=1)
    assert (told.fits, told.spare_bytes) == (True, 0)


def test_near_its_limit_a_plan_must_fit_in_every_order_of_addresses(make_llama: Make) -> None:
    """Which of two equal free blocks is taken decides what they are cut into later."""
    sizes = {"layers": 6, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8}
    model = make_llama("8bit", **{**SHAPE, **sizes})
    placed = {block.name: 0 for block in model.blocks}

    def missing(free_bytes: int, order: int) -> int:
        loaded = Loaded(model, placed, {0: OTHER}, top_down=order)
        return loaded.run(context_tokens=2048, batch=4, limits={0: free_bytes})[0].missing_bytes

    free = 4200 * MIB
    assert [missing(room(free), order) > 0 for order in (TOP_DOWN, *OTHER_ORDERS)] == [
        False, True, True,
    ]  # fmt: skip
    refused = plan(model, machine(free), {"": 0}, context=2048, batch=4)
    assert not refused.fits
    lacks = missing(room(free), OTHER_ORDERS[0])
    assert refused.devices[0].peak_bytes > free - MIB
    assert refused.reasons[0].startswith("GPU 0 lacks ")
    assert lacks > 0
    assert not Predictor(model, {"": 0}, machine(free)).fit(context_tokens=2048, batch=4).fits
    # With room for the worst of them it fits, and is predicted in the usual order.
    roomy = plan(model, machine(free + 2 * lacks), {"": 0}, context=2048, batch=4)
    assert roomy.fits
    usual = Loaded(model, placed, {0: OTHER}).run(context_tokens=2048, batch=4)[0]
    assert roomy.devices[0].peak_bytes == usual.peaks.worst_bytes


def test_near_its_limit_a_plan_in_8_bit_must_fit_wherever_outliers_begin(make_llama: Make) -> None:
    """Whatever the weights of this run: those of the game are trained."""
    sizes = {"layers": 8, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8}
    model = make_llama("8bit", **{**SHAPE, **sizes})
    grows = replace(OTHER, expandable_segments=True)

    def missing(costs: Costs, room_bytes: int) -> int:
        placed = {block.name: 0 for block in model.blocks}
        loaded = Loaded(model, placed, {0: costs})
        used = loaded.run(context_tokens=2048, batch=8, limits={0: room_bytes})
        return used[0].missing_bytes

    def usual() -> int:
        loaded = Loaded(model, {block.name: 0 for block in model.blocks}, {0: grows})
        return loaded.run(context_tokens=2048, batch=8)[0].peaks.worst_bytes

    def fits(free_bytes: int) -> bool:
        on = replace(machine(free_bytes), expandable_segments=True)
        one = Predictor(model, {"": 0}, on)
        found = one.plan(context_tokens=2048, batch=8, placement="p")
        if found.fits:  # what is predicted is what most runs do
            assert found.devices[0].peak_bytes == usual()
        else:
            assert found.reasons[0].startswith("GPU 0 lacks ")
        assert one.fit(context_tokens=2048, batch=8).fits == found.fits
        return found.fits

    short, enough = 6034 * MIB, 6100 * MIB
    trained = [grows.as_trained(first) for first in OUTLIERS_FROM]
    assert not missing(grows, room(short))
    assert any(missing(costs, room(short)) for costs in trained)
    assert not any(missing(costs, room(enough)) for costs in trained)
    assert not fits(short)
    assert fits(enough)
    # The tightest of several GPUs decides, whatever room the others have.
    spread, size = {"": 0, "lm_head": 1}, {"context_tokens": 2048, "batch": 8}
    for free, expected in ((5940 * MIB, False), (6040 * MIB, True)):
        on = replace(machine(free, 80 * GIB), expandable_segments=True)
        one = Predictor(model, spread, on)
        assert one.fit(**size).fits is expected
        assert one.plan(**size, placement="p").fits is expected


def test_outliers_begin_in_a_layer() -> None:
    trained = HOPPER.as_trained(2)
    shares = [trained.outliers_in(layer) for layer in (None, 0, 1, 2, 79)]
    assert shares == [0.0, 0.0, 0.0, TRAINED_OUTLIERS, TRAINED_OUTLIERS]
    assert int(8192 * TRAINED_OUTLIERS) == 7
    assert HOPPER.outliers_in(79) == 0.0
