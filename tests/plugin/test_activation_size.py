"""What the size of activations can tell in a real run, and what a run does where it can't."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fault_files import checkpoint
from pytest_multigpu.probes.formats import save_probe
from pytest_multigpu.probes.synthetic import synthetic_probe

CHECK = (
    Path(__file__).parents[2]
    / "pytest_multigpu"
    / "checks"
    / "test_probe_scoring.py::test_activation_size"
)
WORDS = str(CHECK).replace("test_activation_size", "test_scored_tokens")
"""A check beside it that measures something."""
HIDDEN, LAYERS = 64, 6
SYNTHESISED = "needs the checkpoint; weights were synthesised"
NO_SCALER = "the probe has no scaler, so nothing tells whether its layer and site are right"

Run = Callable[..., "tuple[int, dict[str, Any], pytest.RunResult]"]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Exit code, this check's row and the output of a run with a probe from a file."""

    def start(*args: str, scale: float | None = None, site: Any = "raw") -> Any:
        probe = synthetic_probe(HIDDEN, LAYERS, site=site)
        if scale is not None:
            vectors = (np.zeros(HIDDEN),), (np.full(HIDDEN, scale),)
            probe = dataclasses.replace(probe, mean=vectors[0], scale=vectors[1], normalize=True)
        save_probe(probe, pytester.path / "probe.safetensors")
        result = pytester.runpytest(
            "--gpu-tier=cpu",
            "--gpu-report=out",
            "--gpu-probe=probe.safetensors",
            str(CHECK),
            *args,
        )
        report = json.loads((pytester.path / "out" / "report.json").read_text())
        # A test that failed has a row of its own after its records'.
        rows = [row for row in report["checks"] if row["nodeid"].endswith("test_activation_size")]
        return int(result.ret), rows[0], result

    return start


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A checkpoint whose final norm has weights of one: activations after it are 64 in all."""
    return f"--gpu-model={checkpoint(tmp_path)}"


def test_a_detector_on_synthesised_weights_is_unmeasured(run: Run) -> None:
    """Scaler and site are a real detector's: nothing about them is wrong."""
    code, row, _ = run(WORDS, scale=1.8, site="final_norm")
    assert (code, row["outcome"]) == (0, "skipped")
    assert row["reason"] == f"not measured: {SYNTHESISED}"
    code, row, _ = run(scale=1.8, site="final_norm")  # then nothing at all was measured
    assert (code, row["outcome"]) == (1, "skipped")


def test_strict_demands_the_checkpoint_unless_the_run_is_named_synthetic(run: Run) -> None:
    code, row, result = run("--gpu-strict", scale=1.8, site="final_norm")
    assert (code, row["outcome"], row["reason"]) == (1, "unknown", SYNTHESISED)
    assert result.outlines[-1] == (
        f"NOT READY: {SYNTHESISED}; --gpu-weights=checkpoint; --gpu-weights=synthetic leaves this "
        "check out (cpu tier: no GPU was checked)"
    )
    code, row, _ = run("--gpu-strict", "--gpu-weights=synthetic", scale=1.8, site="final_norm")
    assert row["outcome"] == "skipped"
    assert row["reason"] == "needs the checkpoint; --gpu-weights=synthetic was given"
    # Strict wants one check that ran, which this run of one check has not.
    assert code == 1


def test_on_a_checkpoint_the_size_is_measured(run: Run, weights: str) -> None:
    code, row, _ = run(weights, scale=1.0, site="final_norm")
    assert (code, row["outcome"]) == (0, "passed")
    assert row["measured"] == pytest.approx(1, abs=0.1)
    code, row, _ = run(weights, scale=1.8, site="final_norm")
    assert (code, row["outcome"]) == (1, "failed")
    assert row["measured"] == pytest.approx(1 / 1.8**2, abs=0.03)
    assert "times the size that the probe was fitted on" in row["reason"]


def test_a_probe_without_a_scaler_is_unmeasured(run: Run, weights: str) -> None:
    code, row, _ = run(WORDS, weights)
    assert (code, row["outcome"], row["reason"]) == (0, "skipped", f"not measured: {NO_SCALER}")
    code, row, _ = run(weights, "--gpu-strict")
    assert (code, row["outcome"], row["reason"]) == (1, "unknown", NO_SCALER)


def test_a_gate_with_such_a_probe_lists_the_check_as_a_skip(
    run: Run, weights: str, pytester: pytest.Pytester
) -> None:
    """In place of strict, as the README has it."""
    listed = "--gpu-expected-skips=skips"
    (pytester.path / "skips").write_text("")
    code, _, result = run(weights, listed)
    assert code == 1
    assert "test_activation_size" in result.outlines[-1]
    nodeid = "pytest_multigpu/checks/test_probe_scoring.py::test_activation_size"
    (pytester.path / "skips").write_text(f"{nodeid}\n")
    code, row, _ = run(weights, listed)
    assert (code, row["outcome"]) == (0, "skipped")


def test_the_remedy_as_it_is_printed_makes_the_check_pass(
    run: Run, weights: str, pytester: pytest.Pytester
) -> None:
    """Fitted after the final norm, and said to read the residual stream."""
    from pytest_multigpu.probe_cli.main import main

    code, row, _ = run(weights, scale=1.0, site="raw")
    assert (code, row["outcome"]) == (1, "failed")
    command = row["remedy"].removeprefix("if it was fitted there: ").partition(", and ")[0]
    given = command.removeprefix("python -m pytest_multigpu.probes ").split()
    assert given == ["convert", "probe.safetensors", "moved.safetensors", "--site", "final_norm"]
    assert main(given) == 0
    result = pytester.runpytest(
        "--gpu-tier=cpu", "--gpu-probe=moved.safetensors", weights, str(CHECK)
    )
    assert result.ret == 0
    result.stdout.fnmatch_lines(["passed   activation size *"])
