from __future__ import annotations

import hashlib
from typing import Any

import pytest

from pytest_multigpu.model import synthetic
from pytest_multigpu.model.synthetic import (
    PERIOD,
    SequenceTable,
    SyntheticTensor,
    SyntheticWeights,
    head_row_scales,
    scale_of,
    start_of,
)


def made(name: str, shape: tuple[int, ...], *, dtype: Any = None, head: str | None = None) -> Any:
    import torch

    dtype = dtype or torch.bfloat16
    weights = SyntheticWeights({name: shape}, {name: dtype}, {name: torch.device("cpu")}, head)
    with weights:
        return weights.make(name)


def test_the_bytes_never_change() -> None:
    """Another machine, another release: the same weights. (Recorded with torch 2.13 on a CPU.)"""
    import torch

    values = made("model.layers.0.mlp.up_proj.weight", (64, 128))
    digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest == "a9ec38bcc271175bb6dba4f5e4f1b33d049097fd378144d512bb569d5226e431"


def test_the_definition_by_hand() -> None:
    """The sequence again, with Python's own integers."""
    import torch

    def value(position: int) -> float:
        x = position
        for factor in (0x7FEB352D, 0x45D9F3B):
            x ^= x >> 16
            x = x * factor & 0xFFFFFFFF
        x ^= x >> 16
        total = sum(x >> shift & 0xFF for shift in (0, 8, 16, 24))
        return (total - 510) * (synthetic.BASE_STD / synthetic._UNIT_STD)

    start = start_of("w")
    expected = torch.tensor([value((start + k) % PERIOD) for k in range(16)], dtype=torch.float32)
    ours = made("w", (2, 8), dtype=torch.float32).view(-1) / scale_of((2, 8))
    assert torch.allclose(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", [0, 8, PERIOD - 40, PERIOD - 8])
def test_a_kept_table_and_direct_hashing_agree(monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    import torch

    monkeypatch.setattr(synthetic, "PERIOD", 1000)
    monkeypatch.setattr(synthetic, "_BLOCK", 64)
    start %= 1000
    device = torch.device("cpu")
    one, other = torch.empty(2500), torch.empty(2500)
    SequenceTable(device, torch.float32, keep=True).fill(one, start, 2.0)
    SequenceTable(device, torch.float32, keep=False).fill(other, start, 2.0)
    assert torch.equal(one, other)
    assert torch.equal(one[:1000], one[1000:2000])


def test_the_period_is_eight_times_a_prime() -> None:
    prime = PERIOD // 8
    assert 8 * prime == PERIOD
    assert all(prime % factor for factor in range(2, 2897))
    assert prime < 2897**2


def test_spread_shape_and_names() -> None:
    import torch

    wide = made("a", (64, 8192)).float()
    assert wide.std().item() == pytest.approx(0.02, rel=0.02)
    assert wide.mean().abs().item() < 2e-4
    assert not torch.equal(made("a", (64, 8192)), made("b", (64, 8192)))
    assert len({tuple(row.tolist()) for row in wide}) == 64


@pytest.mark.parametrize(
    ("fan_in", "scale"),
    [
        (8192, 1.0),
        (8193, 0.5),
        (28672, 0.5),
        (2049, 1.0),
        (2048, 2.0),
        (2880, 1.0),  # gpt-oss-20b: with 2.0 its attention took one token of all
        (16384, 0.5),  # Llama 405B
        (128, 8.0),
        (1, 64.0),
    ],
)
def test_scales_are_powers_of_two_that_are_not_too_large(fan_in: int, scale: float) -> None:
    assert scale_of((3, fan_in)) == scale
    spread = 0.02 * scale * fan_in**0.5
    assert 0.9 < spread <= 1.82 or fan_in == 1


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", (512, 128), True),
        ("model.layers.0.mlp.down_proj.weight", (128, 512), False),
        ("model.layers.0.self_attn.q_proj.weight", (512, 128), False),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 96, 128), True),  # narrower experts
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 128, 512), True),  # the other way round
        ("model.layers.0.mlp.experts.down_proj", (8, 512, 128), False),
        ("model.layers.0.mlp.shared_experts.gate_proj.weight", (96, 128), True),
        ("model.layers.0.mlp.gate.weight", (8, 128), False),  # a router
        ("transformer.h.0.mlp.dense_h_to_4h.weight", (512, 128), True),
    ],
)
def test_what_widens(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert synthetic.widens(name, shape) is expected


def test_norms_are_one_and_biases_zero() -> None:
    import torch

    assert torch.equal(made("norm.weight", (4,)), torch.ones(4, dtype=torch.bfloat16))
    assert torch.equal(made("q_proj.bias", (4,)), torch.zeros(4, dtype=torch.bfloat16))
    assert torch.equal(made("up_proj_bias", (2, 4)), torch.zeros(2, 4, dtype=torch.bfloat16))
    assert torch.equal(made("count", (2, 2), dtype=torch.int64), torch.zeros(2, 2).long())


def test_the_head_has_clear_winners() -> None:
    """With equal rows, 16-bit logits tie at the top in one case of ten."""
    import torch

    rows, width, texts = 32000, 256, 100
    hidden = made("hidden", (texts, width), dtype=torch.float32)
    hidden = (hidden / hidden.pow(2).mean(-1, keepdim=True).sqrt()).bfloat16()
    top = {}
    for head in (None, "head"):
        logits = hidden @ made("head", (rows, width), head=head).T
        best = logits.float().topk(2).values
        top[head] = (best[:, 0] == best[:, 1]).sum().item()
        winners = logits.argmax(-1).unique().numel()
    assert top["head"] <= 4 < top[None]
    assert winners > 10


def test_head_scales_have_a_heavy_tail() -> None:
    import torch

    scales = head_row_scales(128256, torch.float32, "cpu")
    assert scales.shape == (128256, 1)
    assert scales.min().item() >= 1.0
    assert 10 < scales.max().item() < 64


def test_a_lazy_tensor_answers_as_safetensors_does() -> None:
    import torch

    calls = []

    def make() -> Any:
        calls.append(1)
        return torch.zeros(2, 3)

    lazy = SyntheticTensor(make, (2, 3), torch.float32)
    assert (lazy.get_shape(), lazy.get_dtype(), calls) == ([2, 3], "F32", [])
    assert lazy[...].shape == (2, 3)
    assert calls == [1]
