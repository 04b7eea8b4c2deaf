from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_multigpu.errors import UsageError
from pytest_multigpu.game_config import GameConfig, read_game_config


def written(folder: Path, data: object) -> Path:
    path = folder / "game.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, GameConfig()),
        ({"use_quantized": False, "quantization_bits": 4}, GameConfig(tier="16bit")),
        ({"use_quantized": True, "quantization_bits": 8}, GameConfig(tier="8bit")),
        ({"quantization_bits": 4}, GameConfig(tier="4bit")),
        ({"model_name": "llama-3.1-8b"}, GameConfig(model="llama-3.1-8b")),
        ({"backend_type": "probe", "num_players": 6, "_comment_x": [1]}, GameConfig()),
        ({"detector_path": "nowhere.pt", "provide_probe_scores": False}, GameConfig()),
    ],
)
def test_what_the_game_will_do(tmp_path: Path, data: object, expected: GameConfig) -> None:
    assert read_game_config(written(tmp_path, data)) == expected


def test_a_detector_beside_the_config_is_found(tmp_path: Path) -> None:
    (tmp_path / "detector.pt").touch()
    config = read_game_config(written(tmp_path, {"detector_path": "detector.pt"}))
    assert config.probe == str(tmp_path / "detector.pt")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "{",
            "malformed JSON: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
        ("[]", "must hold one JSON object, not list"),
        ({"quantization_bits": 3}, "quantization_bits: 3 is not known; write 4, 8 or 16"),
        ({"quantization_bits": "4"}, "quantization_bits: '4' is not known; write 4, 8 or 16"),
        ({"quantization_bits": True}, "quantization_bits: True is not known; write 4, 8 or 16"),
        ({"use_quantized": "yes"}, "use_quantized: 'yes' is neither true nor false"),
        ({"use_quantized": True}, 'quantization_bits: missing; add "quantization_bits": 4 or 8'),
        ({"backend_type": 3}, "backend_type: 3 is not a text; write it in quotes"),
        (
            {"backend_type": "claude"},
            "backend_type: 'claude' runs no model on this machine, so there is nothing to check; "
            'set it to a local backend such as "probe"',
        ),
        ({"detector_path": "no.pt"}, "detector_path: no file 'no.pt'; check the path"),
    ],
)
def test_wrong_values_name_file_and_key(tmp_path: Path, data: object, message: str) -> None:
    path = written(tmp_path, data)
    with pytest.raises(UsageError) as caught:
        read_game_config(path)
    assert str(caught.value) == f"{path}: {message}"


@given(
    st.dictionaries(
        st.sampled_from(["backend_type", "detector_path", "use_quantized", "quantization_bits"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), st.lists),
    )
)
def test_anything_gives_a_config_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]
) -> None:
    path = written(tmp_path_factory.mktemp("game"), data)
    try:
        read_game_config(path)
    except UsageError as error:
        assert str(error).startswith(f"{path}: ")
