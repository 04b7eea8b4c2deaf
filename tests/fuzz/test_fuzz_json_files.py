"""Fuzzed JSON files: device maps, game configs, baselines, drift files and catalogues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fuzzing import FUZZ, JSON, TEXT, altered, files, result_or_one_line
from hypothesis import given
from hypothesis import strategies as st

from pytest_multigpu.game_config import GameConfig, read_game_config
from pytest_multigpu.given_files import read_json
from pytest_multigpu.judging.drift import judge_drift
from pytest_multigpu.planning.catalogue import GpuType, find, merge_catalogue
from pytest_multigpu.planning.device_maps import parse_device_map
from pytest_multigpu.planning.rent import rent_table
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.probes.drift import drift_between
from pytest_multigpu.records.drift import TextScores
from pytest_multigpu.records.plan import Architecture, Block
from pytest_multigpu.report.baseline import read_baselines
from pytest_multigpu.report.drift import keep_scores, read_drift


def model() -> Architecture:
    layers = [
        Block(
            name=f"model.layers.{i}",
            kind="layer",
            layer=i,
            weights_bytes=4 << 20,
            kv_bytes_per_token=64,
        )
        for i in range(3)
    ]
    return Architecture(
        model="tiny",
        model_class="LlamaForCausalLM",
        tier="16bit",
        dtype="bfloat16",
        blocks=(
            Block(name="model.embed_tokens", kind="embedding", weights_bytes=1 << 20),
            *layers,
            Block(name="model.norm", kind="norm", weights_bytes=512),
            Block(name="lm_head", kind="head", weights_bytes=1 << 20),
        ),
        hidden_size=64,
        intermediate_size=128,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab_size=300,
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "detector.pt").touch()
    return folder / "file.json"


NAMES = ["", "model", "model.layers", "model.layers.1", "model.layers.1.mlp", "lm_head", "x"]
PLACE = st.sampled_from([0, 1, 2, -1, "0", "cuda:1", "cpu", "disk", "cuda:", "\u0662"]) | JSON
GOOD = st.dictionaries(
    st.sampled_from(NAMES[:4]) | st.just("lm_head"), st.sampled_from([0, "1", "cuda:0", "disk"])
).map(lambda m: {"": 0, **m})
MAPS = (
    GOOD
    | GOOD.flatmap(altered)
    | st.dictionaries(st.sampled_from(NAMES) | TEXT, PLACE, max_size=4)
    | st.dictionaries(st.sampled_from(NAMES), PLACE, max_size=4).map(lambda m: {"": 0, **m})
    | JSON
)


@FUZZ
@given(content=files(MAPS))
def test_device_maps(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    architecture, machine = model(), simulate("2xT4")
    found = result_or_one_line(
        lambda: parse_device_map(
            read_json(path, "--gpu-placement"),
            source=str(path),
            architecture=architecture,
            machine=machine,
        )
    )
    if found is not None:
        assert list(found) == [block.name for block in architecture.blocks]
        assert set(found.values()) <= {0, 1, "cpu", "disk"}


GAME = st.fixed_dictionaries(
    {},
    optional={
        "backend_type": st.sampled_from(["probe", "claude"]) | JSON,
        "detector_path": st.sampled_from(["detector.pt", ".", "/dev/null", "~", ""]) | TEXT | JSON,
        "provide_probe_scores": st.booleans() | JSON,
        "use_quantized": st.booleans() | JSON,
        "quantization_bits": st.sampled_from([4, 8, 16, 4.0, "4", True]) | JSON,
        "model": TEXT | JSON,
        "model_name": TEXT | JSON,
        "_comment_game": JSON,
    },
)


@FUZZ
@given(content=files(GAME | JSON))
def test_game_configs(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found = result_or_one_line(lambda: read_game_config(path), begins=f"{path}: ")
    if found is not None:
        assert isinstance(found, GameConfig)
        assert found.tier in (None, "4bit", "8bit", "16bit")
        assert found.probe is None or Path(found.probe).is_file()


BASELINES: dict[str, Any] = {
    "schema": 1,
    "baselines": {
        "4 x H100": {
            "peak cuda:0": {"name": "peak", "kind": "peak", "value": 1 << 35, "device": "cuda:0"},
            "load time": {"name": "load time", "kind": "load", "value": 12.5, "device": ""},
        },
        "cpu": {"speed": {"name": "speed", "kind": "speed", "value": 3.5}},
    },
}


@FUZZ
@given(content=files(altered(BASELINES) | JSON))
def test_baselines(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found = result_or_one_line(lambda: read_baselines(path), begins=f"{path}: ")
    for baseline in (found or {}).values():
        assert all(type(one.value) is float for one in baseline.values.values())


SUBJECT: Any = dict.fromkeys(("model", "weights", "probe", "texts", "tokens"), "x")
DRIFT: dict[str, Any] = {
    "schema": 1,
    "scores": [
        {
            **SUBJECT,
            "tier": tier,
            "dtype": "bfloat16",
            "gpus": ["H100"],
            "versions": {"torch": "2.11.0"},
            "when": 1.5,
            "values": values,
        }
        for tier, values in (("16bit", [0.5, -1.25, 3.0]), ("8bit", [1e30, -1e-30, 0.0]))
    ],
}
NOW = TextScores(**SUBJECT, tier="16bit", dtype="bfloat16", values=(1.0, 2.0, 4.0))


@FUZZ
@given(content=files(altered(DRIFT) | altered(DRIFT) | JSON))
def test_drift_files(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found = result_or_one_line(lambda: read_drift(path), begins=f"{path}: ")
    if found is not None:
        # What was accepted can be compared with, and added to.
        if all(len(one.values) == 3 for one in found if one.subject == NOW.subject):
            records = judge_drift(NOW, found, drift_between, (0.1, 0.5))
            assert all(record.reason.isprintable() for record in records)
        keep_scores(path, found[0] if found else NOW)
        assert len(read_drift(path)) == max(1, len(found))


ROW = st.fixed_dictionaries(
    {},
    optional={
        "name": TEXT | JSON,
        "total": st.integers(-1, 10**12) | JSON,
        "reserved": st.integers(-1, 10**12) | JSON,
        "bandwidth": st.floats(0, 2e6) | st.sampled_from([5e-324, 1e-300]) | JSON,
        "price": st.floats(0, 10) | JSON,
        "capability": st.lists(st.integers(-1, 12), max_size=3) | JSON,
        "nvlink": st.booleans() | JSON,
    },
)
CATALOGUES = st.dictionaries(st.sampled_from(["H100", "h 100", "New", "5"]) | TEXT, ROW, max_size=2)


@FUZZ
@given(content=files(CATALOGUES | CATALOGUES | JSON))
def test_catalogues(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found: tuple[GpuType, ...] | None = result_or_one_line(
        lambda: merge_catalogue(read_json(path, "--gpu-catalogue"), source=str(path))
    )
    for row in found or ():
        assert 0 < row.free_bytes <= row.total_bytes
        assert find(row.key, found or ()) is not None
    if found is not None:
        # What was accepted can be planned with.
        table = rent_table({"16bit": model()}, context_tokens=64, batch=1, catalogue=found)
        assert all(line.usd_per_million_tokens > 0 for line in table)
