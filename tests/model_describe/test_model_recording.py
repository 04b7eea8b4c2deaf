"""Recording on the meta device: what comes and goes, formulas, kinds of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_multigpu.model import cache
from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import ResolvedModel, preset_config
from pytest_multigpu.model.formulas import UnclearError, formula
from pytest_multigpu.model.kv import LayerKv
from pytest_multigpu.model.passes import (
    _kinds,
    _two_primes,
    passes_of,
    quantised_in_layers,
    repeats_kv_to_decode,
)
from pytest_multigpu.model.recording import Recording, TooManyStepsError
from pytest_multigpu.records.passes import Pass, Passes, Size

T = 8


def meta(*shape: int, dtype: Any = torch.bfloat16) -> Any:
    return torch.empty(*shape, dtype=dtype, device="meta")


def recorded(run: Any, *, truth: bool = True, **settings: Any) -> list[tuple[Any, ...]]:
    recording = Recording(torch.nn.Identity(), truth=truth, **settings)
    with recording:
        run(recording)
    return [event[:3] for event in recording.events]


def test_a_tensor_comes_once_and_goes_with_its_last_view() -> None:
    x = meta(T, 4)

    def run(_: Recording) -> None:
        y = x + x
        view = y.view(-1)[1:]
        del y
        z = view * 2
        del view
        del z

    assert recorded(run) == [
        ("take", 1, T * 4 * 2),
        ("take", 2, (T * 4 - 1) * 2),
        ("drop", 1, 0),
        ("drop", 2, 0),
    ]


def test_what_is_there_before_and_what_is_made_while_paused_is_not_recorded() -> None:
    model = torch.nn.Linear(4, 4, device="meta")
    recording = Recording(model, truth=True)
    with recording:
        seen = model.weight.view(-1)
        with recording.paused():
            kept = torch.zeros(4, device="meta")
        view = kept[1:]
        assert recording.tensor(view) == 0
        made = kept + 1
        assert recording.tensor(made) == 1
        del seen, view, kept
    assert [event.op for event in recording.events] == ["take"]


def test_segments_are_those_of_the_moment() -> None:
    recording = Recording(torch.nn.Identity(), truth=True)
    with recording:
        y = meta(T)
        recording.segment = 5
        del y
    assert [(event.op, event.segment) for event in recording.events] == [("take", 0), ("drop", 5)]


@pytest.mark.parametrize("truth", [True, False])
def test_the_truth_of_a_tensor_is_the_callers(truth: bool) -> None:
    def run(_: Recording) -> None:
        assert bool(meta(3).all()) is truth

    recorded(run, truth=truth)


@pytest.mark.parametrize(
    ("dtype", "taken"), [(torch.bfloat16, [4 * T, 4 * T]), (torch.float16, [4 * T])]
)
def test_softmax_in_fp32_converts_float16_on_the_way(dtype: Any, taken: list[int]) -> None:
    x = meta(T, dtype=dtype)

    def run(_: Recording) -> None:
        assert torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32).dtype is torch.float32

    assert [number for op, _, number in recorded(run) if op == "take"] == taken


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.bfloat16])
def test_attention_is_a_cuda_kernels(layout: str, mask: Any) -> None:
    """No score matrix; the output is laid out like the query, so that joining the heads of one
    that is laid out tokens first takes no copy."""
    query = meta(2, 3, T, 16) if layout == "heads first" else meta(2, T, 3, 16).transpose(1, 2)
    key, value = meta(2, 3, T, 16), meta(2, 3, T, 24)
    given = None if mask is None else torch.ones(1, 1, T, T, dtype=mask, device="meta")
    expanded = None if given is None else given.expand(2, 1, T, T)

    def run(_: Recording) -> None:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=expanded
        )
        assert out.shape == (2, 3, T, 24)
        joined = out.transpose(1, 2).contiguous()
        del out, joined

    events = recorded(run)
    output, statistics = 2 * 3 * T * 24 * 2, 2 * 3 * T * 4
    copies = [output] if layout == "heads first" else []
    assert [n for op, _, n in events if op == "take"] == [output, statistics, *copies]
    masks = [(op, n) for op, _, n in events if op in ("mask", "bias")]
    expected = {torch.bool: "mask", torch.bfloat16: "bias"}
    assert masks == ([(expected[mask], 2 * T * T)] if mask is not None else [])
    assert sum(op == "drop" for op, *_ in events) == len(events) // 2


def test_a_linear_that_the_tier_quantises_is_named_by_its_shape() -> None:
    linear = torch.nn.Linear(16, 24, device="meta", dtype=torch.bfloat16)
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        conv = Conv1D(24, 16).to(torch.bfloat16)
    for module, weight in ((linear, linear.weight), (conv, conv.weight)):
        recording = Recording(module, truth=True, quantised={id(weight)})
        with recording:
            out = module(meta(2, T, 16))
            assert (out.shape, out.dtype) == ((2, T, 24), torch.bfloat16)
            del out
            turned = meta(2, 16, T).transpose(1, 2)
            recording.linear(turned, weight, 24, 16)  # must be copied first
        linears = [event for event in recording.events if event.op == "linear"]
        assert [event[2:5] for event in linears] == [(2 * T, 24, 16)] * 2
        taken = [event.number for event in recording.events if event.op == "take"]
        assert taken == [2 * T * 16 * 2] * 3
        plain = Recording(module, truth=True)
        with plain:
            module(meta(2, T, 16))
        assert "linear" not in [event.op for event in plain.events]


def test_a_loop_is_given_up() -> None:
    def run(_: Recording) -> None:
        for size in range(11):
            meta(size)

    with pytest.raises(TooManyStepsError, match="more than 10 steps"):
        recorded(run, most=10)


@pytest.mark.parametrize(
    ("numbers", "size"),
    [
        ((7, 7), Size(7)),
        ((11 * 5, 13 * 5), Size(5, batch_power=1)),
        ((3 * 64, 5 * 64), Size(0, 64)),
        ((11 * 3 * 64, 13 * 5 * 64), Size(0, 64, batch_power=1)),
        ((9 * 2, 25 * 2), Size(0, 0, 2)),
        ((11 * 9 * 2, 13 * 25 * 2), Size(0, 0, 2, 1)),
        # tokens x (tokens + 1): attention sinks; tokens and a fixed number: a window's cache.
        ((11 * 12 * 16, 13 * 30 * 16), Size(0, 16, 16, 1)),
        ((3 * 8 + 100, 5 * 8 + 100), Size(100, 8)),
        ((9 * 8 + 100, 25 * 8 + 100), Size(100, 0, 8)),
    ],
)
def test_two_sizes_give_a_formula(numbers: tuple[int, int], size: Size) -> None:
    found = formula(numbers, (11, 13), (3, 5))
    assert found == size
    assert [found.of(batch, tokens) for batch, tokens in ((11, 3), (13, 5))] == list(numbers)


def test_one_sequence_has_no_power_of_the_batch() -> None:
    assert formula((3 * 11, 5 * 11), (1, 1), (3, 5)) == Size(0, 11)


def test_what_has_no_formula_is_refused() -> None:
    # Rounded up to blocks of 256, with the tokens of a recording.
    with pytest.raises(UnclearError, match="no formula gives 768 and 1024 bytes"):
        formula((768, 1024), (1, 1), (607, 1021))
    with pytest.raises(UnclearError):
        formula((9, 7), (1, 1), (3, 5))


@pytest.mark.parametrize(
    ("above", "most", "primes"),
    [
        (2, 1024, (607, 1021)),
        (2, 63, (31, 61)),
        (2, 7, (3, 7)),
        (4, 7, (5, 7)),
        (64, 136, (73, 131)),
    ],
)
def test_numbers_of_tokens_are_prime_and_apart(above: int, most: int, primes: Any) -> None:
    assert _two_primes(above, most) == primes


def test_no_two_primes() -> None:
    with pytest.raises(UnclearError, match="no two prime numbers of tokens between 4 and 6"):
        _two_primes(4, 6)


def test_layers_are_of_one_kind_unless_shapes_or_settings_differ() -> None:
    def layer(width: int = 4, window: int | None = None, index: int = 0) -> Any:
        made: Any = torch.nn.Sequential(torch.nn.Linear(4, width, device="meta"))
        made.sliding_window, made.layer_idx = window, index
        made.scale = 1.0 / (index + 1)
        return made

    layers = [layer(index=0), layer(index=1), layer(window=8), layer(width=5), layer(index=4)]
    plain, windowed = LayerKv(bytes_per_token=4), LayerKv(bytes_per_token=4, window=8)
    assert _kinds(layers, [plain] * 5) == [0, 0, 1, 2, 0]
    assert _kinds(layers, [plain, windowed, plain, plain, plain]) == [0, 1, 2, 3, 0]


def test_a_cache_that_no_step_fills_is_unclear() -> None:
    from pytest_multigpu.model.meta import new_meta_model

    tiny = preset_config("tiny-llama")
    for size, found in ((256, True), (0, False)):
        passes, unknown = passes_of(
            "tiny",
            lambda: new_meta_model(tiny, tier="16bit", dtype="bfloat16").model,
            quantised=(),
            caches=[LayerKv(bytes_per_token=size)] * 6,
            max_context=4096,
        )
        assert (passes is not None) is found
        assert unknown == (
            ()
            if found
            else (
                "what its layers take in a pass could not be recorded on the meta device "
                "(UnclearError); activations are counted as Llama's of the same sizes",
            )
        )


def passes(family: str, **config: Any) -> Passes:
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
    }
    resolved = ResolvedModel(name=family, config_dict={"model_type": family, **shape, **config})
    found = describe(resolved, tier="16bit").passes
    assert found is not None
    assert describe(resolved, tier="16bit").passes == found  # from the disk cache
    return found


def test_every_situation_is_recorded_and_comes_back_from_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = passes("qwen3")
    assert (plain.kinds, plain.window) == ((0,) * 5, None)
    assert len({(p.phase, p.batched, p.beyond) for p in plain.recorded}) == 6
    assert isinstance(plain.find("decode", batch=1, tokens=100_000), Pass)
    windowed = passes("gemma3_text", sliding_window=32)
    assert (windowed.kinds, windowed.window) == ((0,) * 5, 32)
    assert len(windowed.recorded) == 12
    for tokens, beyond in ((31, False), (32, True)):
        for batch, batched in ((1, False), (2, True)):
            found = windowed.find("probe", batch=batch, tokens=tokens)
            assert (found.phase, found.batched, found.beyond) == ("probe", batched, beyond)
    # A window that no context reaches is none.
    assert passes("gemma3_text", sliding_window=256).window is None
    monkeypatch.setattr(cache, "_read", lambda *_: None)
    assert passes("gemma3_text", sliding_window=32) == windowed


def test_only_sequences_of_unequal_lengths_have_a_mask() -> None:
    for one in passes("qwen3").recorded:
        steps = (*one.before, *one.layers[0].steps)
        assert ("mask" in {step.op for step in steps}) is one.batched
        squares = any(step.size.square for step in one.before)
        assert squares is (one.batched and one.phase != "decode")
        kept = {"prefill": 1, "decode": 1, "probe": 0}[one.phase]
        assert [step.op for step in one.layers[0].steps].count("cache") == kept


def test_a_situation_that_was_not_recorded_is_an_error() -> None:
    empty = Passes(kinds=(0,), window=None, recorded=())
    with pytest.raises(LookupError, match="no pass was recorded for \\('prefill', True, False\\)"):
        empty.find("prefill", batch=2, tokens=3)


def test_the_linears_that_would_be_quantised_are_those_that_are() -> None:
    from pytest_multigpu.model.meta import new_meta_model

    for name in ("tiny-llama", "mixtral-8x7b"):
        found = [
            quantised_in_layers(
                new_meta_model(preset_config(name), tier=tier, dtype="bfloat16").model
            )
            for tier in ("16bit", "8bit", "4bit")
        ]
        assert found[0] == found[1] == found[2]
        assert not any("lm_head" in name for name in found[0])
        assert any(name.endswith("self_attn.q_proj") for name in found[0])


def test_whether_k_and_v_are_repeated_to_decode_is_the_installed_attentions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(sdpa_attention, "pack_gqa", print, raising=False)
    assert not repeats_kv_to_decode()
    monkeypatch.delattr(sdpa_attention, "pack_gqa")
    assert repeats_kv_to_decode()
    assert describe(preset_config("tiny-llama"), tier="cpu").repeats_kv_to_decode
