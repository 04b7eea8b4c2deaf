"""Generation and memory on the built-in model, for real, on the CPU; faults planted."""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pytest_multigpu.judging.distribution import judge_distribution
from pytest_multigpu.judging.generation import judge_generation, tolerance_for
from pytest_multigpu.model import generation, memory, witness
from pytest_multigpu.model.generation import (
    first_generation,
    read_generation,
    without_cudnn_attention,
)
from pytest_multigpu.model.loaded import LoadedModel, release
from pytest_multigpu.model.loading import load_model
from pytest_multigpu.model.memory import LeakMeter, PeakMeter
from pytest_multigpu.model.peaks import NEW_TOKENS, measure_phases, padding_mask
from pytest_multigpu.model.witness import Witness
from pytest_multigpu.records.generation import GenerationReading, Timing
from pytest_multigpu.units import MIB


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tiny(request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    loaded = load_model(
        "tiny-llama", tier="cpu", dtype=request.param, device_map={"": "cpu"}, weights="synthetic"
    )
    yield loaded
    release(loaded)


def read(loaded: LoadedModel, new_tokens: int = 8) -> GenerationReading:
    return read_generation(loaded, first_generation(loaded, new_tokens=new_tokens))


def outcomes(reading: GenerationReading, loaded: LoadedModel) -> dict[str, str]:
    tolerance = tolerance_for(loaded.architecture.tier, loaded.architecture.dtype)
    return {record.name: record.outcome for record in judge_generation(reading, tolerance)}


def test_a_healthy_model_passes_and_every_token_is_timed(tiny: LoadedModel) -> None:
    reading = read(tiny, 5)
    assert set(outcomes(reading, tiny).values()) == {"passed"}
    assert len(reading.first_tokens) == 5
    assert len(reading.first.decode_seconds) == len(reading.first.waiting_seconds) == 4
    assert reading.positions == reading.prompt_tokens + 4
    assert reading.cudnn_attention is None


def test_the_second_generation_is_held_against_the_first(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = first_generation(tiny, new_tokens=4)
    real = generation.generate
    # Another vocabulary's logits, the same tokens: then other tokens from the second one on.
    for change, found in (
        (lambda tokens, logits: (tokens, logits.roll(1, dims=-1)), "failed"),
        (lambda tokens, logits: ((tokens[0], -1, *tokens[2:]), logits), "failed"),
        (lambda tokens, logits: (tokens, logits), "passed"),
    ):

        def other(*args: Any, change: Any = change, **more: Any) -> Any:
            tokens, logits, timing = real(*args, **more)
            return *change(tokens, logits), timing

        monkeypatch.setattr(generation, "generate", other)
        reading = read_generation(tiny, first)
        assert len(reading.repeat_errors) == 4
        assert outcomes(reading, tiny)["greedy twice"] == found


@pytest.mark.parametrize(
    ("steps", "on_gpu", "asked"),
    [
        # Seconds of a step, pass by pass: the repeat, new lengths, without cuDNN attention.
        ((0.7,), True, ("repeat",)),
        ((0.1,), False, ("repeat",)),
        ((0.1, 0.15), True, ("repeat", "new")),
        ((0.1, 0.16, 0.1), True, ("repeat", "new", "off")),
    ],
)
def test_new_lengths_are_met_again_where_the_first_pass_was_slow(
    tiny: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    steps: tuple[float, ...],
    on_gpu: bool,
    asked: tuple[str, ...],
) -> None:
    import torch

    first = first_generation(tiny, new_tokens=6)
    slow = Timing(prefill_seconds=1.0, decode_seconds=(1.0,) * 5)
    first = replace(first, timing=slow)
    at = len(first.prompt)
    seen: list[tuple[int, int, bool]] = []

    def generate(_: Any, prompt: Any, new_tokens: int) -> Any:
        seen.append((len(prompt), new_tokens, torch.backends.cuda.cudnn_sdp_enabled()))
        step = steps[len(seen) - 1]
        return first.tokens, first.logits, Timing(prefill_seconds=1.0, decode_seconds=(step,))

    monkeypatch.setattr(generation, "generate", generate)
    if on_gpu:
        monkeypatch.setattr(type(tiny), "cuda_devices", (0,))
        monkeypatch.setattr(generation, "launch_seconds", lambda gpu: 1e-6 * (gpu + 1))
    reading = read_generation(tiny, first)
    on = torch.backends.cuda.cudnn_sdp_enabled()
    expected = {"repeat": (at, 6, on), "new": (at + 6, 4, on), "off": (at + 10, 4, False)}
    assert seen == [expected[name] for name in asked]
    assert reading.repeat.decode_seconds == steps[:1]
    new, off = reading.new_lengths, reading.without_cudnn
    assert (new and new.decode_seconds) == (steps[1:2] or None)
    assert (off and off.decode_seconds) == (steps[2:3] or None)


def test_a_cache_that_loses_its_order_is_found(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.cache_utils import DynamicLayer

    real = DynamicLayer.update

    def update(self: Any, keys: Any, values: Any, *args: Any, **more: Any) -> Any:
        keys, values = real(self, keys, values, *args, **more)
        return keys, values.roll(1, dims=-2)

    monkeypatch.setattr(DynamicLayer, "update", update)
    assert outcomes(read(tiny), tiny)["cached equals uncached"] == "failed"


def test_zeroed_cache_is_found(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cache_utils import DynamicLayer

    real = DynamicLayer.update

    def update(self: Any, keys: Any, values: Any, *args: Any, **more: Any) -> Any:
        keys, values = real(self, keys, values, *args, **more)
        if keys.shape[-2] > 10:
            values = values.clone()
            values[..., :-1, :] = 0
        return keys, values

    monkeypatch.setattr(DynamicLayer, "update", update)
    assert outcomes(read(tiny), tiny)["cached equals uncached"] == "failed"


def test_nan_weights_are_found_and_never_pass(tiny: LoadedModel) -> None:
    import torch

    weight = tiny.decoder_layers[3].mlp.down_proj.weight
    kept = weight[0].clone()
    with torch.no_grad():
        weight[0] = float("nan")
    try:
        found = outcomes(read(tiny, 3), tiny)
    finally:
        with torch.no_grad():
            weight[0] = kept
    assert found["finite logits"] == found["cached equals uncached"] == "failed"


def test_the_whole_model_on_the_host_is_right_in_the_cpu_tier(tiny: LoadedModel) -> None:
    records = judge_distribution(tiny.placement, tiny.architecture, None, visible=0)
    assert {r.name: r.outcome for r in records} == {
        "parameters and layers": "passed",
        "nothing offloaded": "passed",
        "total parameters": "passed",
        "placement as planned": "unknown",
    }


def test_phases_are_measured_in_the_plans_order(tiny: LoadedModel) -> None:
    meter = PeakMeter(("cpu",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # transformers warns of arguments that it will drop
        phases = measure_phases(tiny, meter, context_tokens=40, batch=2)
    assert [phase.phase for phase in phases] == ["probe", "prefill", "decode"]
    assert meter.phases == list(phases)
    assert all((phase.readings[0].used_bytes or 0) > 10 * MIB for phase in phases)
    assert all(not layer._forward_hooks for layer in tiny.decoder_layers)


def test_several_sequences_are_of_unequal_lengths_when_their_peaks_are_measured(
    tiny: LoadedModel,
) -> None:
    """Without padding transformers makes no mask, and the plan counts one."""
    seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        mask = kwargs["attention_mask"]
        seen.append((mask.tolist(), kwargs["position_ids"].tolist()))

    decoder = tiny.model.get_decoder()
    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        measure_phases(tiny, PeakMeter(("cpu",)), context_tokens=4 + NEW_TOKENS, batch=3)
    finally:
        handle.remove()
    probe, prefill, *steps = seen
    mask = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert probe == prefill == (mask, [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 1, 2]])
    assert len(steps) == NEW_TOKENS
    assert steps[0] == ([[*row, 1] for row in mask], [[4], [3], [3]])
    assert [len(step[0][0]) for step in steps] == list(range(5, 5 + NEW_TOKENS))


def test_one_sequence_is_measured_without_a_mask(tiny: LoadedModel) -> None:
    seen: list[Any] = []
    handle = tiny.model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    try:
        measure_phases(tiny, PeakMeter(("cpu",)), context_tokens=20, batch=1)
    finally:
        handle.remove()
    assert seen == [None] * (2 + NEW_TOKENS)


@pytest.mark.parametrize(
    ("batch", "tokens", "lengths"),
    [(2, 8, [8, 6]), (4, 64, [64, 56, 48, 40]), (3, 2, [2, 1, 1]), (2, 1, [1, 1])],
)
def test_lengths_of_a_padded_batch(batch: int, tokens: int, lengths: list[int]) -> None:
    mask = padding_mask(batch, tokens, "cpu")
    assert mask.sum(dim=-1).tolist() == lengths
    # On the left: a row never falls.
    assert bool((mask.diff(dim=-1) >= 0).all())
    assert padding_mask(1, tokens, "cpu") is None


def test_experts_are_measured_as_generate_runs_them(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer versions gather experts' weights from the second token on."""
    told: list[str] = []
    count = 0

    @contextlib.contextmanager
    def deciding() -> Iterator[None]:
        told.append(f"begin after {count}")
        yield
        told.append(f"end after {count}")

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    monkeypatch.setattr(tiny.model, "_optimize_model_for_decode", deciding, raising=False)
    handle = tiny.model.get_decoder().register_forward_pre_hook(note)
    try:
        measure_phases(tiny, PeakMeter(("cpu",)), context_tokens=20, batch=1)
    finally:
        handle.remove()
    assert told == ["begin after 2", f"end after {2 + NEW_TOKENS}"]


def test_the_setting_comes_back_after_a_failure() -> None:
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(KeyError), without_cudnn_attention():  # noqa: PT012
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled() is before


def test_a_peak_that_comes_and_goes_is_seen_also_when_the_phase_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = [100]
    monkeypatch.setattr(witness, "_resident_bytes", lambda: size[0])
    monkeypatch.setattr(witness, "INTERVAL_SECONDS", 0.001)
    meter = PeakMeter(("cpu",))
    with pytest.raises(KeyError), meter.measure("spike"):  # noqa: PT012
        size[0] = 900
        __import__("time").sleep(0.1)
        size[0] = 100
        raise KeyError
    assert meter.phases[0].readings[0].used_bytes == 900


def test_leftover_is_the_least_of_several_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([50, 40, 45, 90, 70, 80])
    monkeypatch.setattr(witness, "_resident_bytes", lambda: next(readings))
    (left,) = LeakMeter(Witness(("cpu",))).leftover()
    assert (left.before_bytes, left.after_bytes, left.left_bytes) == (40, 70, 30)


class FakeNvmlError(Exception):
    pass


def fake_nvml(used: dict[str, int]) -> Any:
    def handle(uuid: str) -> str:
        if uuid not in used:
            raise FakeNvmlError
        return uuid

    nvml: Any = types.ModuleType("pynvml")
    nvml.NVMLError, nvml.nvmlMemory_v2 = FakeNvmlError, 7
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = handle
    nvml.nvmlDeviceGetMemoryInfo = lambda h, version: types.SimpleNamespace(used=used[h])
    return nvml


def test_cuda_index_meets_nvml_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    uuids = {0: "bbb", 1: "aaa", 2: "lost"}
    peaks = {0: (5, 6), 1: (7, 8), 2: (1, 2)}
    reset: list[int] = []
    cuda = torch.cuda
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml({"GPU-aaa": 11, "GPU-bbb": 22}))
    for module in (memory, witness):
        monkeypatch.setattr(module, "cuda_ready", lambda: True)
    monkeypatch.setattr(
        cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid=uuids[i])
    )
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda i: peaks[i][0])
    monkeypatch.setattr(cuda, "max_memory_reserved", lambda i: peaks[i][1])
    meter = PeakMeter(("cuda:0", "cuda:1", "cuda:2"))
    with meter.measure("decode") as measured:
        pass
    assert reset == [0, 1, 2]
    assert [
        (r.device, r.allocated_bytes, r.reserved_bytes, r.used_bytes)
        for r in measured.peaks.readings
    ] == [("cuda:0", 5, 6, 22), ("cuda:1", 7, 8, 11), ("cuda:2", 1, 2, None)]
