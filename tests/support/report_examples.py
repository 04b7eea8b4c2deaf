"""A 70B on four H100s, as a run would report it. Numbers after the project's measurements."""

from __future__ import annotations

from typing import Any

from pytest_multigpu.records.check import Record
from pytest_multigpu.records.drift import TextScores
from pytest_multigpu.records.machine import Gpu, Machine
from pytest_multigpu.records.model import (
    DevicePlacement,
    LoadReport,
    PeakReading,
    PhasePeaks,
    Placement,
)
from pytest_multigpu.records.plan import Architecture, Block, DevicePlan, Peaks, Plan
from pytest_multigpu.records.report import CheckResult, RunReport, Span, VramSample
from pytest_multigpu.units import GIB, MIB

NAME = "NVIDIA H100 80GB HBM3"
LAYER, EMBED, NORM = 1_711_308_800, 2_101_346_304, 16_384
FREE = 84_500_000_000
SPLIT = ((0, 18), (19, 39), (40, 60), (61, 79))


def machine(count: int = 4, *, name: str = NAME) -> Machine:
    return Machine(
        gpus=tuple(
            Gpu(
                index=i,
                cuda_index=i,
                uuid=f"GPU-{i:08d}",
                name=name,
                total_bytes=85_520_809_984,
                free_bytes=FREE,
                reserved_bytes=480 * MIB,
                capability=(9, 0),
                nvlinks=18,
            )
            for i in range(count)
        ),
        driver="580.159.04",
        cuda="13.0",
        visible=tuple(range(count)),
    )


def architecture() -> Architecture:
    return Architecture(
        model="llama-3.3-70b",
        model_class="LlamaForCausalLM",
        tier="16bit",
        dtype="bfloat16",
        blocks=(
            Block(name="model.embed_tokens", kind="embedding", weights_bytes=EMBED),
            *(
                Block(name=f"model.layers.{i}", kind="layer", layer=i, weights_bytes=LAYER)
                for i in range(80)
            ),
            Block(name="model.norm", kind="norm", weights_bytes=NORM),
            Block(name="lm_head", kind="head", weights_bytes=EMBED),
        ),
        hidden_size=8192,
        intermediate_size=28672,
        layers=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_context=131072,
    )


def plan() -> Plan:
    devices, device_map = [], {"model.embed_tokens": 0}
    for gpu, (first, last) in enumerate(SPLIT):
        count = last - first + 1
        weights = count * LAYER + (EMBED if gpu == 0 else 0) + (EMBED + NORM if gpu == 3 else 0)
        kv, act, reserve = count * 4096 * 2048, 512 * MIB, 900 * MIB
        peak = weights + kv + act + reserve
        devices.append(
            DevicePlan(
                device=f"cuda:{gpu}",
                layers=(first, last),
                weights_bytes=weights,
                kv_bytes=kv,
                activation_bytes=act,
                reserve_bytes=reserve,
                peak_bytes=peak,
                limit_bytes=FREE,
                peaks=Peaks(
                    load_bytes=peak - act, prefill_bytes=peak, decode_bytes=peak - act // 2
                ),
            )
        )
        device_map |= {f"model.layers.{i}": gpu for i in range(first, last + 1)}
    return Plan(
        architecture=architecture(),
        weights="synthetic",
        placement="auto",
        context_tokens=2048,
        batch=1,
        fits=True,
        devices=tuple(devices),
        device_map=device_map | {"model.norm": 3, "lm_head": 3},
    )


def check(name: str, *records: Record, seconds: float = 0.5, file: str = "machine") -> CheckResult:
    bad = any(record.outcome == "failed" for record in records)
    return CheckResult(
        nodeid=f"pytest_multigpu/checks/test_{file}.py::test_{name}",
        outcome="failed" if bad else "passed",
        seconds=seconds,
        records=records,
    )


def free_vram(gpus: int = 4) -> CheckResult:
    return check(
        "free_vram",
        *(
            Record(
                name="free VRAM",
                outcome="passed",
                expected=f"at least {36 * GIB}",
                measured=FREE + i * MIB * 300,
                unit="bytes",
                device=f"cuda:{i}",
            )
            for i in range(gpus)
        ),
    )


def copies(gpus: int = 4, *, broken: tuple[int, int] | None = None) -> CheckResult:
    records = []
    for a in range(gpus):
        for b in range(gpus):
            if a == b:
                continue
            bad = (a, b) == broken
            records.append(
                Record(
                    name="copy speed",
                    outcome="failed" if bad else "passed",
                    expected="at least 20",
                    measured=7.5 if bad else 150.0 + 10 * a + b,
                    unit="GB/s",
                    device=f"cuda:{a} -> cuda:{b}",
                    reason=f"GPU {a} -> GPU {b} is slow" if bad else "",
                    remedy="rent a machine with NVLink" if bad else "",
                )
            )
    return check("copies", *records, file="interconnect")


def few_gpus() -> CheckResult:
    return check(
        "gpu_count",
        Record(
            name="GPUs",
            outcome="failed",
            expected=2,
            measured=1,
            unit="GPUs",
            reason="needs 2 GPUs with 40.0 GiB free each; found 1 (GPU 0: 79.2 GiB free)",
            remedy="rent 2 or more",
            shortfall=True,
        ),
    )


def speed() -> CheckResult:
    return check(
        "speed",
        Record(
            name="decode speed",
            outcome="warned",
            expected="at least 12",
            measured=10.04,
            unit="tokens/s",
            reason="decoding is slower than half the bandwidth floor.",
            remedy="torch.backends.cuda.enable_cudnn_sdp(False)",
        ),
        file="generation",
        seconds=6.5,
    )


def peaks() -> tuple[PhasePeaks, ...]:
    return tuple(
        PhasePeaks(
            phase=phase,
            readings=tuple(
                PeakReading(
                    device=f"cuda:{i}",
                    allocated_bytes=34 * GIB + extra,
                    reserved_bytes=35 * GIB + extra,
                    used_bytes=36 * GIB + extra + i * 100 * MIB,
                )
                for i in range(4)
            ),
        )
        for phase, extra in (("prefill", 300 * MIB), ("decode", 200 * MIB), ("probe", 100 * MIB))
    )


def four_h100s(*checks: CheckResult) -> RunReport:
    """A whole finished run, without its verdict."""
    timeline = tuple(
        VramSample(
            seconds=t * 0.5,
            device=f"cuda:{i}",
            used_bytes=min(36 * GIB, int(t * (2.2 + i * 0.1) * GIB)),
        )
        for t in range(60)
        for i in range(4)
    )
    return RunReport(
        machine=machine(),
        plan=plan(),
        load=LoadReport(
            weights="synthetic", seconds=0.74, bytes=141_107_412_992, loader="transformers"
        ),
        placement=Placement(
            devices=tuple(
                DevicePlacement(
                    device=d.device,
                    parameters=d.weights_bytes // 2,
                    weights_bytes=d.weights_bytes,
                    layers=tuple(range(d.layers[0], d.layers[1] + 1)) if d.layers else (),
                )
                for d in plan().devices
            ),
            device_map=plan().device_map,
        ),
        checks=checks or (free_vram(), copies(), speed()),
        tier="16bit",
        versions={"torch": "2.11.0", "transformers": "5.17.0", "pytest": "9.1.0"},
        started=1_793_000_000.0,
        wall_seconds=31.5,
        peaks=peaks(),
        vram=timeline,
        spans=(
            Span(nodeid="pytest_multigpu/checks/test_machine.py::test_free_vram", start=0, end=1),
            Span(nodeid="pytest_multigpu/checks/test_generation.py::test_speed", start=18, end=25),
        ),
    )


def text_scores(**changes: Any) -> TextScores:
    """Scores of four texts in 16 bit on two H100s."""
    given: dict[str, Any] = {
        "model": "llama-3.3-70b",
        "weights": "synthetic",
        "probe": "a" * 16,
        "texts": "alibi-60 1",
        "tokens": "b" * 16,
        "tier": "16bit",
        "dtype": "bfloat16",
        "gpus": ("NVIDIA H100 80GB HBM3",) * 2,
        "versions": {"torch": "2.11.0"},
        "when": 1.0,
        "values": (0.0, 1.0, 2.0, 3.0),
    }
    return TextScores(**{**given, **changes})
