"""The predicted map against what from_pretrained itself computes on a faked machine."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_multigpu.errors import LoadError
from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.automap import AutoMap, auto_device_map, search_max_memory
from pytest_multigpu.model.config import ResolvedModel, preset_config
from pytest_multigpu.planning.max_memory import max_memory_for_auto
from pytest_multigpu.records.automap import Planner
from pytest_multigpu.records.plan import DeviceMap, MaxMemory, Tier

GIB = 1 << 30
SEVENTY = preset_config("llama-3.3-70b")
SMALL = ResolvedModel(
    name="small",
    config_dict={
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
)
TIED = ResolvedModel(
    name="tied",
    config_dict={**SMALL.config_dict, "model_type": "qwen2", "tie_word_embeddings": True},
)


class Planned(Exception):  # noqa: N818 - not an error: it carries the map out of from_pretrained
    pass


def stock(
    monkeypatch: pytest.MonkeyPatch,
    resolved: ResolvedModel,
    tier: Tier,
    free: Mapping[int, int],
    *,
    cpu: int,
    caps: Mapping[int | str, int] | MaxMemory | None = None,
) -> dict[str, int | str] | str:
    """The map, or the ValueError's text, of ``from_pretrained(device_map="auto")`` itself, with
    only the machine's numbers faked."""
    import torch
    import transformers.modeling_utils as utils
    from accelerate.utils import modeling
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig

    class FakeTorch:
        cuda = SimpleNamespace(
            device_count=lambda: len(free),
            mem_get_info=lambda index: (free[index], 80 * GIB),
            get_device_properties=lambda _: SimpleNamespace(is_integrated=False),
        )

        def tensor(self, *_: object, **__: object) -> None:
            return None

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    real = utils._get_device_map

    def carry_out(*args: Any, **kwargs: Any) -> None:
        raise Planned(real(*args, **kwargs))

    quantisation = {
        "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "4bit": lambda: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    }.get(tier, lambda: None)()
    config = CONFIG_MAPPING[resolved.config_dict["model_type"]].from_dict(
        copy.deepcopy(dict(resolved.config_dict))
    )
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "torch", FakeTorch())
        patch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=cpu))
        patch.setattr(utils, "_get_device_map", carry_out)
        try:
            AutoModelForCausalLM._model_mapping[type(config)].from_pretrained(
                None,
                config=config,
                state_dict={},
                dtype=torch.bfloat16,
                device_map="auto",
                max_memory=None if caps is None else dict(caps),
                quantization_config=quantisation,
            )
        except Planned as planned:
            return dict(planned.args[0])
        except ValueError as error:
            return " ".join(str(error).split())
    raise AssertionError("from_pretrained did not plan")


def same(found: AutoMap, expected: dict[str, int | str] | str) -> bool:
    if isinstance(expected, str):
        return found.refusal == expected
    return found.refusal is None and list(found.device_map.items()) == list(expected.items())


@pytest.mark.parametrize("tier", ["16bit", "8bit", "4bit"])
@pytest.mark.parametrize(
    "free",
    [
        {0: 79 * GIB, 1: 79 * GIB, 2: 79 * GIB, 3: 79 * GIB},
        {0: 79 * GIB},
        {0: 20 * GIB, 1: 79 * GIB, 2: 47 * GIB},
    ],
)
def test_llama_70b_as_from_pretrained_plans_it(
    monkeypatch: pytest.MonkeyPatch, tier: Tier, free: dict[int, int]
) -> None:
    found = auto_device_map(SEVENTY, tier=tier, free_bytes=free, cpu_bytes=200 * GIB)
    assert same(found, stock(monkeypatch, SEVENTY, tier, free, cpu=200 * GIB))


@pytest.mark.parametrize("resolved", [SMALL, TIED], ids=lambda model: model.name)
@pytest.mark.parametrize("tier", ["16bit", "8bit", "4bit"])
@pytest.mark.parametrize("kib", [300, 800])
@pytest.mark.parametrize("gpus", [1, 3])
def test_small_models_at_many_sizes(
    monkeypatch: pytest.MonkeyPatch, resolved: ResolvedModel, tier: Tier, kib: int, gpus: int
) -> None:
    free = dict.fromkeys(range(gpus), kib * 1024)
    cpu = 300 * 1024  # so little that some of them spill to the disk as well
    found = auto_device_map(resolved, tier=tier, free_bytes=free, cpu_bytes=cpu)
    assert same(found, stock(monkeypatch, resolved, tier, free, cpu=cpu))


@pytest.mark.parametrize(
    "caps", [{0: 10 * GIB, 1: 70 * GIB, "cpu": 100 * GIB}, {0: 79 * GIB}, {1: 60 * GIB}]
)
def test_the_users_own_caps(monkeypatch: pytest.MonkeyPatch, caps: dict[int | str, int]) -> None:
    free = {0: 79 * GIB, 1: 79 * GIB}
    found = auto_device_map(SEVENTY, tier="16bit", free_bytes=free, cpu_bytes=200 * GIB, caps=caps)
    assert same(found, stock(monkeypatch, SEVENTY, "16bit", free, cpu=200 * GIB, caps=caps))


def test_no_gpu_at_all() -> None:
    found = auto_device_map(SMALL, tier="16bit", free_bytes={}, cpu_bytes=GIB)
    assert found.device_map == {"": "cpu"}
    assert found.offloaded == ("",)


def test_what_auto_refuses_is_shown_with_the_map_that_it_refused() -> None:
    found = auto_device_map(SEVENTY, tier="8bit", free_bytes={0: 79 * GIB}, cpu_bytes=200 * GIB)
    assert found.refusal is not None
    assert found.refusal.startswith("Some modules are dispatched on the CPU or the disk.")
    assert "\n" not in found.refusal
    assert found.offloaded[0] == "model.layers.75"
    assert found.offloaded[-1] == "lm_head"


def test_16_bit_spills_without_a_refusal() -> None:
    free = {0: int(139.8 * GIB)}
    found = auto_device_map(SEVENTY, tier="16bit", free_bytes=free, cpu_bytes=200 * GIB)
    assert found.refusal is None
    # As measured on one H200: 4 layers and the head.
    assert [name for name in found.offloaded if "layers" in name] == [
        f"model.layers.{index}" for index in range(76, 80)
    ]
    assert "lm_head" in found.offloaded


def test_the_library_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import accelerate as planner

    def names() -> tuple[object, ...]:
        return planner.accelerate_max_memory, planner.torch, planner._get_device_map

    before = names()
    auto_device_map(SMALL, tier="8bit", free_bytes={0: 100}, cpu_bytes=GIB, use_cache=False)
    assert names() == before

    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(planner, "_get_device_map", fail)
    with pytest.raises(RuntimeError):
        auto_device_map(SMALL, tier="8bit", free_bytes={0: 100}, cpu_bytes=GIB, use_cache=False)
    assert planner.torch is sys.modules["torch"]


def test_this_processs_own_allocator_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def asked(*_: object) -> int:
        pytest.fail("asked CUDA")

    def plan() -> AutoMap:
        return auto_device_map(
            SEVENTY, tier="16bit", free_bytes={0: 79 * GIB}, cpu_bytes=GIB, use_cache=False
        )

    before = plan()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", asked)
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
    assert plan() == before


def test_a_transformers_without_this_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import accelerate as planner

    monkeypatch.delattr(planner, "accelerate_max_memory")
    with pytest.raises(
        LoadError,
        match=r"^transformers [\d.]+ has no planner in transformers.integrations.accelerate; "
        r"install transformers>=5.10, or give --gpu-placement=balanced$",
    ):
        auto_device_map(SMALL, tier="16bit", free_bytes={0: 100}, cpu_bytes=GIB)


def found_for(resolved: ResolvedModel, tier: Tier, target: DeviceMap) -> MaxMemory | None:
    architecture = describe(resolved, tier=tier)
    whole = {block.name: target.get(block.name, target.get("")) for block in architecture.blocks}
    placed = {name: place for name, place in whole.items() if place is not None}

    def search(planner: Planner) -> MaxMemory | None:
        return max_memory_for_auto(architecture, placed, planner)

    return search_max_memory(resolved, tier=tier, dtype="bfloat16", target=placed, search=search)


@pytest.mark.parametrize(
    ("tier", "free", "cap"), [("16bit", int(139.1 * GIB), "133GiB"), ("8bit", 78 * GIB, "77GiB")]
)
def test_the_max_memory_with_which_auto_keeps_all_on_one_gpu(
    monkeypatch: pytest.MonkeyPatch, tier: Tier, free: int, cap: str
) -> None:
    """16 bit on one H200, 8 bit on one H100: with it from_pretrained itself does not offload."""
    plain = auto_device_map(SEVENTY, tier=tier, free_bytes={0: free}, cpu_bytes=200 * GIB)
    assert plain.refusal or plain.offloaded
    caps = found_for(SEVENTY, tier, {"": 0})
    assert caps == {0: cap}
    assert stock(monkeypatch, SEVENTY, tier, {0: free}, cpu=200 * GIB, caps=caps) == {"": 0}


def test_the_max_memory_that_makes_auto_even(monkeypatch: pytest.MonkeyPatch) -> None:
    free = dict.fromkeys(range(4), 78 * GIB)
    ends = (19, 40, 61, 80)
    layers = {f"model.layers.{i}": sum(i >= end for end in ends) for i in range(80)}
    even = {"model.embed_tokens": 0, **layers, "model.norm": 3, "lm_head": 3, "": 3}
    caps = found_for(SEVENTY, "16bit", even)
    assert caps is not None
    planned = stock(monkeypatch, SEVENTY, "16bit", free, cpu=200 * GIB, caps=caps)
    assert isinstance(planned, dict)
    assert {name: planned[name] for name in layers} == layers
    # 4 bit: auto takes an even share and a buffer of GPU 0 at most, less what it keeps back.
    assert found_for(SEVENTY, "4bit", even) is None


def test_no_planner_no_max_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import accelerate as planner

    monkeypatch.delattr(planner, "accelerate_max_memory")
    assert found_for(SMALL, "16bit", {"": 0}) is None
