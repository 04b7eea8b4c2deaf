from __future__ import annotations

import json

import pytest

from pytest_multigpu.presets import BUILT_IN, HUB_IDS, PRESETS, preset_name


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_plain_json_with_a_model_type(name: str) -> None:
    config = dict(PRESETS[name])
    assert json.loads(json.dumps(config)) == config
    assert isinstance(config["model_type"], str)


@pytest.mark.parametrize(
    ("given", "preset"),
    [
        ("llama-3.3-70b", "llama-3.3-70b"),
        ("Llama-3.3-70B", "llama-3.3-70b"),
        (" llama-3.3-70b ", "llama-3.3-70b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b"),
        ("META-LLAMA/llama-3.3-70b-instruct", "llama-3.3-70b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("llama-3.3", None),
        ("other/Llama-3.3-70B-Instruct", None),
    ],
)
def test_names_and_hub_ids_in_any_case(given: str, preset: str | None) -> None:
    assert preset_name(given) == preset


def test_every_preset_but_the_built_in_one_is_on_the_hub() -> None:
    assert set(HUB_IDS) == set(PRESETS) - {BUILT_IN}


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["llama-3.3-70b"]["hidden_size"] = 1  # type: ignore[index]
