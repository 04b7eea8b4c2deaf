"""Does a probe belong to a model: names, layers, and how large activations are."""

from __future__ import annotations

import pytest

from pytest_multigpu.judging.probe_fit import judge_fit, judge_size, unmeasured_size
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.probe import ProbeFit, SizeReading


def fit_of(probe_model: str, model: str) -> ProbeFit:
    return ProbeFit(
        probe_hidden=8,
        model_hidden=8,
        probe_layers=(1,),
        model_layers=2,
        probe_model=probe_model,
        model=model,
    )


OWN = "--gpu-probe=FILE with a probe of this model"


def test_a_probe_that_fits() -> None:
    found = ProbeFit(
        probe_hidden=8,
        model_hidden=8,
        probe_layers=(0, 2),
        model_layers=2,
        probe_model=None,
        model="tiny",
    )
    assert judge_fit(found) == [
        Record(name="probe hidden size", outcome="passed", expected=8, measured=8),
        Record(
            name="probe layers",
            outcome="passed",
            expected="hidden_states 0 to 2",
            measured="0, 2",
        ),
    ]


def test_a_probe_that_does_not_fit() -> None:
    found = ProbeFit(
        probe_hidden=16,
        model_hidden=8,
        probe_layers=(1, 3, 4),
        model_layers=2,
        probe_model="acme/Other-9B",
        model="tiny",
    )
    assert judge_fit(found) == [
        Record(
            name="probe hidden size",
            outcome="failed",
            expected=8,
            measured=16,
            reason="the probe was fitted on a model of another hidden size",
            remedy=OWN,
        ),
        Record(
            name="probe layers",
            outcome="failed",
            expected="hidden_states 0 to 2",
            measured="1, 3, 4",
            reason="layer 3, 4 is out of range for 2 layers",
            remedy=OWN,
        ),
        Record(
            name="probe model",
            outcome="failed",
            expected="acme/Other-9B",
            measured="tiny",
            reason="the probe was fitted on another model",
            remedy=OWN,
        ),
    ]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("acme/tiny-llama", ""),
        ("acme/tiny-llama-tuned", "by its name the probe was fitted on a variant of the model"),
        *(
            (path, "the model is a folder, whose name does not tell which it is")
            for path in ("/weights", "~weights", "a/b/weights", "./weights")
        ),
        ("/weights/tiny-llama/snapshot", ""),
        ("tiny", "by its name the probe was fitted on a variant of the model"),
        ("tin", "the probe was fitted on another model"),
    ],
)
def test_what_is_said_of_names(model: str, reason: str) -> None:
    record = judge_fit(fit_of("acme/tiny-llama", model))[2]
    assert (record.name, record.reason) == ("probe model", reason)
    assert record.remedy == (OWN if reason else "")


@pytest.mark.parametrize(
    ("probe_model", "model_name", "outcome"),
    [
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b", "passed"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "passed"),
        ("meta-llama/Llama-3.3-70B-Instruct", "/data/models/Llama-3.3-70B-Instruct", "passed"),
        ("meta-llama/Llama-3.3-70B-Instruct", "/data/weights", "warned"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-8b", "failed"),
    ],
)
def test_model_ids(probe_model: str, model_name: str, outcome: str) -> None:
    assert judge_fit(fit_of(probe_model, model_name))[2].outcome == outcome


@pytest.mark.parametrize(
    ("probe_model", "model_name", "outcome"),
    [
        # Points are not dropped between digits.
        ("facebook/opt-1.3b", "facebook/opt-13b", "failed"),
        # An empty or tiny name is part of everything.
        ("meta-llama/Llama-3.3-70B-Instruct", "models/", "failed"),
        ("meta-llama/Llama-3.3-70B-Instruct", "./", "warned"),
        ("meta-llama/Llama-3.3-70B-Instruct", "b", "failed"),
        ("", "llama-3.3-70b", "failed"),
        # Fine-tunes score otherwise; another storage does not.
        ("meta-llama/Llama-3.3-70B-Instruct", "acme/Llama-3.3-70B-Instruct-abliterated", "warned"),
        ("meta-llama/Llama-3.3-70B-Instruct", "acme/Llama-3.3-70B-Instruct-bnb-4bit", "passed"),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama-3_3-70B", "failed"),
        (
            "meta-llama/Llama-3.3-70B-Instruct",
            "/cache/models--meta-llama--Llama-3.3-70B-Instruct/snapshots/0a1b",
            "passed",
        ),
        ("meta-llama/Llama-3.3-70B-Instruct", "/models/Llama-3.3-70B-Instruct/", "passed"),
        ("gpt2", "gpt2-medium", "warned"),
    ],
)
def test_model_names_that_look_alike(probe_model: str, model_name: str, outcome: str) -> None:
    assert judge_fit(fit_of(probe_model, model_name))[2].outcome == outcome


def size(layer: int, site: str, ratio: float, own: int = 22, *, probe: bool = False) -> SizeReading:
    return SizeReading(layer=layer, site=site, ratio=ratio, own_layer=own, is_probe=probe)


@pytest.mark.parametrize(
    ("ratio", "outcome"),
    [(0.4999, "failed"), (0.5, "passed"), (1.0, "passed"), (2.0, "passed"), (2.0001, "failed")],
)
def test_ratio_limits(ratio: float, outcome: str) -> None:
    assert judge_size([size(22, "raw", ratio, probe=True)]).outcome == outcome
    # The same limits hold for where else it would fit.
    other = judge_size([size(22, "raw", 9, probe=True), size(21, "raw", ratio)]).reason
    assert ("layer 21, site raw, would fit" in other) == (outcome == "passed")


def test_whole_records_of_sizes() -> None:
    common = {"name": "activation size", "expected": "0.5 to 2", "unit": "times"}
    good = [size(3, "raw", 1.25, own=3, probe=True), size(4, "raw", 1.5, own=4, probe=True)]
    assert judge_size(good) == Record(outcome="passed", measured=1.25, **common)  # type: ignore[arg-type]
    bad = [good[0], size(5, "raw", 4, own=5, probe=True), size(6, "raw", 8, own=6, probe=True)]
    assert judge_size(bad) == Record(
        **common,  # type: ignore[arg-type]
        outcome="failed",
        measured=4,
        reason="activations at layer 5, site raw, are 4 times the size that the probe was fitted "
        "on; no neighbouring layer or site would fit",
        remedy=OWN,
    )
    assert judge_size([size(3, "raw", 1.0)]) == Record(
        **common,  # type: ignore[arg-type]
        outcome="unknown",
        reason="the probe's own layer was not read",
    )


def remedy(*others: SizeReading, source: str = "detector.pt", own: float = 0.1) -> str:
    record = judge_size([size(22, "raw", own, probe=True), *others], source=source)
    assert record.outcome == "failed"
    assert record.measured == own
    return record.remedy


COMMAND = "if it was fitted there: python -m pytest_multigpu.probes convert detector.pt"
USE = ", and --gpu-probe=moved.safetensors"


def test_the_remedy_is_a_command_that_moves_the_probe() -> None:
    assert remedy(size(23, "raw", 0.9)) == f"{COMMAND} moved.safetensors --layer 23{USE}"
    assert remedy(size(22, "final_norm", 0.9)) == (
        f"{COMMAND} moved.safetensors --site final_norm{USE}"
    )
    assert remedy(size(21, "final_norm", 0.9)) == (
        f"{COMMAND} moved.safetensors --layer 21 --site final_norm{USE}"
    )
    assert "convert 'my probes/it'\"'\"'s.pt' moved" in remedy(
        size(23, "raw", 0.9), source="my probes/it's.pt"
    )
    assert remedy(size(23, "raw", 0.4)) == OWN


def test_what_differs_in_one_thing_alone_comes_first() -> None:
    """After an RMSNorm the activations of every layer are as large."""
    normed = [size(layer, "final_norm", 1.0) for layer in (20, 21, 23)]
    assert "--site final_norm," in remedy(*normed, size(22, "final_norm", 0.9))
    assert "--layer 24," in remedy(*normed, size(24, "raw", 1.9), size(18, "raw", 0.5))
    # Of those, the one that fits best, which is no matter of the sign.
    assert "--layer 25," in remedy(size(24, "raw", 0.5), size(25, "raw", 1.9))


def test_one_layer_of_several_is_moved_by_its_own_scaler() -> None:
    readings = [
        size(4, "raw", 1.1, own=4, probe=True),
        size(3, "raw", 1.0, own=4),
        size(9, "raw", 7.0, own=9, probe=True),
        # The probe reads layer 4 already, and layer 3 fits the other one's scaler.
        size(4, "raw", 1.0, own=9),
        size(8, "raw", 1.2, own=9),
    ]
    record = judge_size(readings, source="detector.pt")
    assert record.reason == (
        "activations at layer 9, site raw, are 7 times the size that the probe was fitted on; "
        "layer 8, site raw, would fit (1.2)"
    )
    assert record.remedy == f"{COMMAND} moved.safetensors --layer 9=8{USE}"


def test_a_synthesised_probe_has_no_other_place() -> None:
    readings = [size(22, "raw", 3.0, probe=True), size(23, "raw", 1.0)]
    record = judge_size(readings, from_scaler=False)
    assert record.name == "activation size, against other texts"
    assert record.reason == (
        "activations at layer 22, site raw, are 3 times the size on other texts"
    )
    assert record.remedy == "pytest -m quick, for the copies between GPUs"


def test_sizes_that_nothing_tells_are_unmeasured() -> None:
    common = {"name": "activation size", "outcome": "unknown", "expected": "0.5 to 2"}
    assert unmeasured_size(synthesised=True) == Record(
        **common,  # type: ignore[arg-type]
        unit="times",
        reason="needs the checkpoint; weights were synthesised",
        remedy="--gpu-weights=checkpoint; --gpu-weights=synthetic leaves this check out",
    )
    assert unmeasured_size(synthesised=False) == Record(
        **common,  # type: ignore[arg-type]
        unit="times",
        reason="the probe has no scaler, so nothing tells whether its layer and site are right",
        remedy="add mean and scale of the activations that it was fitted on to the probe's file",
    )
