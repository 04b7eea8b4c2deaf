"""Events put together into a report."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_multigpu.machine.worker_report import ReportBuilder, on_gpus


def build(*events: dict[str, Any], ending: tuple[str, str] | None = None) -> Any:
    builder = ReportBuilder()
    for event in events:
        builder.add(event)
    return builder.build(ending=ending, seconds=1.0)


def start(step: str, *gpus: int) -> dict[str, Any]:
    return {"event": "start", "step": step, "gpus": list(gpus), "at": 5.0}


HUNG = ("hung", "; killed after 30 s")


@pytest.mark.parametrize(
    ("events", "failure", "gpus"),
    [
        ((), "the CUDA worker hung after step 'start'; killed after 30 s", ()),
        (
            (start("import torch"),),
            "the CUDA worker hung at step 'import torch'; killed after 30 s",
            (),
        ),
        (
            (start("contexts", 0, 1, 2), {"event": "left", "step": "contexts", "gpu": 1}),
            "the CUDA worker hung at step 'contexts' on GPU 0, GPU 2; killed after 30 s",
            (0, 2),
        ),
        (
            (
                start("copies", 0, 1, 2),
                {"event": "at", "step": "copies", "gpus": [2, 0], "path": True},
            ),
            "the CUDA worker hung at step 'copies' on GPU 2 -> GPU 0; killed after 30 s",
            (2, 0),
        ),
        (
            (start("copies", 0, 1), {"event": "end", "step": "copies", "seconds": 0.1}),
            "the CUDA worker hung after step 'copies'; killed after 30 s",
            (),
        ),
    ],
)
def test_where_it_stopped(
    events: tuple[dict[str, Any], ...], failure: str, gpus: tuple[int, ...]
) -> None:
    report = build(*events, ending=HUNG)
    assert report.failure == failure
    assert report.failed_gpus == gpus


def test_speeds_and_links_join_their_pairs() -> None:
    at = {"source": 0, "target": 1}
    report = build(
        {
            "event": "result",
            "kind": "link",
            "value": {**at, "link": "NVLink", "topology": "SYS"},
        },
        {
            "event": "result",
            "kind": "pair",
            "value": {
                **at,
                "bytes": 64,
                "differing_bytes": 3,
                "first_offset": 9,
                "kind": "stale",
            },
        },
        {"event": "result", "kind": "pair speed", "value": {**at, "gb_per_s": 210.0}},
    )
    (pair,) = report.pairs
    assert (pair.link, pair.topology, pair.gb_per_s) == ("NVLink", "SYS", 210.0)
    assert (pair.differing_bytes, pair.first_offset, pair.kind) == (3, 9, "stale")
    assert report.failure is None


def test_two_speeds_of_one_gpu_are_one_row() -> None:
    report = build(
        {"event": "result", "kind": "load", "value": {"gpu": 1, "tflop_per_s": 600.0}},
        {"event": "result", "kind": "memory speed", "value": {"gpu": 1, "gb_per_s": 3000.0}},
    )
    (speed,) = report.speeds
    assert (speed.gpu, speed.tflop_per_s, speed.memory_gb_per_s) == (1, 600.0, 3000.0)


def test_on_gpus() -> None:
    assert on_gpus((), path=False) == ""
    assert on_gpus((3,), path=False) == " on GPU 3"
    assert on_gpus((0, 1), path=True) == " on GPU 0 -> GPU 1"
