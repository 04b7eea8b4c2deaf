"""Device maps from people: prefixes, coverage, GPUs that are not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_multigpu.errors import UsageError
from pytest_multigpu.planning.device_maps import expand, parse_device_map, split_blocks
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Architecture


def parse(loaded: object, model: Architecture, spec: str = "2xH100") -> dict[str, int | str]:
    return parse_device_map(loaded, source="map.json", architecture=model, machine=simulate(spec))


def test_prefixes_and_spellings(make_llama: Callable[..., Architecture]) -> None:
    model = make_llama(layers=2)
    loaded = {"_comment_": "x", "model": "cuda:1", "model.layers": "0", "lm_head": "cpu"}
    assert parse(loaded, model) == {
        "model.embed_tokens": 1,
        "model.layers.0": 0,
        "model.layers.1": 0,
        "model.norm": 1,
        "lm_head": "cpu",
    }
    assert set(parse({"": 1}, model).values()) == {1}


def test_layer_1_does_not_cover_layer_10(make_llama: Callable[..., Architecture]) -> None:
    model = make_llama(layers=11)
    loaded = {block.name: 0 for block in model.blocks if block.name != "model.layers.10"}
    with pytest.raises(UsageError) as error:
        parse(loaded, model)
    assert str(error.value) == (
        "map.json: nothing says where model.layers.10 goes; add it, or a module around it"
    )


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (
            [],
            "a device map is a JSON object from module names to GPUs; "
            'write {"": 0} or {"model.layers.0": 0, ...}',
        ),
        (
            {"": 0, "model.layers.1": 7},
            "model.layers.1 is on GPU 7, but CUDA sees GPUs 0 to 1; edit the file or rent "
            "another machine",
        ),
        (
            {"": -1},
            " is on GPU -1, but CUDA sees GPUs 0 to 1; edit the file or rent another machine",
        ),
        (
            {"": 2},
            " is on GPU 2, but CUDA sees GPUs 0 to 1; edit the file or rent another machine",
        ),
        (
            {"": "cuda:9999"},
            " is on GPU 9999, but CUDA sees GPUs 0 to 1; edit the file or rent another machine",
        ),
        ({"": "cuda:10000"}, ' is on \'cuda:10000\'; write a GPU\'s number, "cpu" or "disk"'),
        ({"": "\u0661"}, ' is on \'\u0661\'; write a GPU\'s number, "cpu" or "disk"'),
        ({"": 1.0}, ' is on 1.0; write a GPU\'s number, "cpu" or "disk"'),
        (
            {"_comment": "nothing else"},
            "nothing says where model.embed_tokens goes; add it, or a module around it",
        ),
        ({"": True}, ' is on True; write a GPU\'s number, "cpu" or "disk"'),
        ({"": "gpu0"}, ' is on \'gpu0\'; write a GPU\'s number, "cpu" or "disk"'),
        (
            {"": 0, "model.layer.1": 0},
            "model.layer.1 is no module of a small Llama; its modules: model.embed_tokens, "
            "model.layers.0 to lm_head",
        ),
        (
            {"model": 0},
            "nothing says where lm_head goes; add it, or a module around it",
        ),
        (
            {"": 0, "model.layers.1.mlp": 1},
            "model.layers.1 is split over several devices; put it on one, as its residual "
            "connection needs",
        ),
    ],
)
def test_bad_maps(loaded: object, message: str, make_llama: Callable[..., Architecture]) -> None:
    with pytest.raises(UsageError) as error:
        parse(loaded, make_llama(layers=2))
    assert str(error.value) == f"map.json: {message}"


def test_one_gpu_and_none(make_llama: Callable[..., Architecture]) -> None:
    model = make_llama(layers=1)
    with pytest.raises(UsageError, match="but CUDA sees GPU 0; edit"):
        parse({"": 1}, model, "1xH100")
    with pytest.raises(UsageError) as error:
        parse_device_map({"": 0}, source="m", architecture=model, machine=Machine())
    assert str(error.value) == (
        "m:  is on GPU 0, but CUDA sees no GPU; edit the file or rent another machine"
    )


def test_parts_of_a_block_stand_for_it(make_llama: Callable[..., Architecture]) -> None:
    model = make_llama(layers=2)
    whole: dict[str, int | str] = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.norm": 1,
        "lm_head": "disk",
    }
    parts: dict[str, int | str] = {"model.layers.1.self_attn": 1, "model.layers.1.mlp": 1}
    assert parse({**whole, **parts}, model)["model.layers.1"] == 1
    assert split_blocks(model, {**whole, **parts}) == ()
    torn: dict[str, int | str] = {
        **whole,
        **parts,
        "model.layers.0.mlp": 1,
        "model.layers.1.mlp": "cpu",
    }
    assert split_blocks(model, torn) == ("model.layers.0", "model.layers.1")


def test_expand_names_what_is_missing(make_llama: Callable[..., Architecture]) -> None:
    with pytest.raises(UsageError) as error:
        expand(make_llama(layers=1), {"model": 0})
    assert str(error.value) == "device_map: nothing says where lm_head goes; add it"
