"""One generation serves the generation checks and the probe's, and neither fails for the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.model import generation
from pytest_multigpu.probes.formats import save_probe
from pytest_multigpu.probes.synthetic import synthetic_probe

CHECKS = Path(__file__).parents[2] / "pytest_multigpu" / "checks"
GENERATION, PROBE = "test_generation.py", "test_probe_scoring.py"
CACHED = f"{PROBE}::test_cached_generation"


Outcomes = Callable[..., "dict[str, str]"]


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each generation."""
    made: list[int] = []
    real = generation.generate

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(generation, "generate", counted)
    return made


@pytest.fixture
def outcomes(pytester: pytest.Pytester) -> Outcomes:
    """Outcome of each test that a run with these checks has."""

    def run(*checks: str, probe: Path | None = None) -> dict[str, str]:
        given = [] if probe is None else [f"--gpu-probe={probe}"]
        pytester.runpytest(
            "--gpu-tier=cpu", "--gpu-report=out", *given, *(str(CHECKS / one) for one in checks)
        )
        report = json.loads((pytester.path / "out" / "report.json").read_text())
        found: dict[str, str] = {}
        for row in report["checks"]:
            name = row["nodeid"].rpartition("::")[2]
            if found.get(name, "passed") == "passed":
                found[name] = row["outcome"]
        return found

    return run


def test_two_generations_serve_all(outcomes: Outcomes, generations: list[int]) -> None:
    found = outcomes(GENERATION, CACHED)
    assert set(found.values()) == {"passed"}
    assert set(found) == {"test_greedy_generation", "test_speed", "test_cached_generation"}
    assert len(generations) == 2


def test_the_probe_s_check_alone_generates_once(outcomes: Outcomes, generations: list[int]) -> None:
    assert outcomes(CACHED) == {"test_cached_generation": "passed"}
    assert len(generations) == 1


def test_the_other_way_round(outcomes: Outcomes, generations: list[int]) -> None:
    assert set(outcomes(CACHED, GENERATION).values()) == {"passed"}
    assert len(generations) == 2


@pytest.mark.parametrize("kind", ["out of range", "damaged"])
def test_a_bad_probe_fails_its_own_check_alone(
    outcomes: Outcomes, generations: list[int], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "probe.safetensors"
    if kind == "damaged":
        path.write_bytes(b"\x00" * 8 + b"{not a probe")
    else:
        save_probe(synthetic_probe(64, 80, layers=(22,)), path)
    found = outcomes(GENERATION, CACHED, probe=path)
    assert found["test_greedy_generation"] == found["test_speed"] == "passed"
    assert found["test_cached_generation"] in ("failed", "error")
    assert len(generations) == 2


def test_a_cache_that_loses_its_order_fails_both(
    outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe's check still holds activations of the cached generation against a forward."""
    from transformers.cache_utils import DynamicLayer

    real = DynamicLayer.update

    def update(self: Any, keys: Any, values: Any, *args: Any, **more: Any) -> Any:
        keys, values = real(self, keys, values, *args, **more)
        return keys, values.roll(1, dims=-2)

    monkeypatch.setattr(DynamicLayer, "update", update)
    found = outcomes(GENERATION, CACHED)
    assert found["test_greedy_generation"] == found["test_cached_generation"] == "failed"
