"""Events of the CUDA worker (``cuda/emitter.py``) put together into a report.

Pure; imports records only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..records.worker import (
    ChainCopy,
    GpuSpeed,
    PairCopy,
    Product,
    TorchVersions,
    Unmeasured,
    Upload,
    WorkerDevice,
    WorkerReport,
    WorkerStep,
)


class ReportBuilder:
    """Takes events in the order they came; ``build`` may be called at any time."""

    def __init__(self) -> None:
        self.done = False
        self.failed_reason: str | None = None
        self._open: tuple[str, tuple[int, ...], bool] | None = None
        self._last = "start"
        self._steps: list[WorkerStep] = []
        self._versions: TorchVersions | None = None
        self._devices: list[WorkerDevice] = []
        self._uploads: dict[int, Upload] = {}
        self._pairs: dict[tuple[int, int], PairCopy] = {}
        self._links: dict[tuple[int, int], tuple[Any, str]] = {}
        self._chains: list[ChainCopy] = []
        self._products: list[Product] = []
        self._speeds: dict[int, GpuSpeed] = {}
        self._unmeasured: list[Unmeasured] = []

    def add(self, event: Mapping[str, Any]) -> None:
        """Take one event; of an unknown kind: KeyError, since both sides are of one version."""
        kind = event["event"]
        if kind == "start":
            gpus = tuple(event["gpus"])
            self._open = (event["step"], gpus, False)
            self._steps.append(
                WorkerStep(name=event["step"], started=event["at"], seconds=None, gpus=gpus)
            )
        elif kind == "at" and self._open:
            self._open = (self._open[0], tuple(event["gpus"]), bool(event["path"]))
        elif kind == "left" and self._open:
            name, gpus, path = self._open
            self._open = (name, tuple(gpu for gpu in gpus if gpu != event["gpu"]), path)
        elif kind == "end":
            self._steps[-1] = replace(self._steps[-1], seconds=event["seconds"])
            self._last = event["step"]
            self._open = None
        elif kind == "failed":
            self.failed_reason = event["reason"]
            path = bool(self._open and self._open[2])
            self._open = (event["step"], tuple(event["gpus"]), path)
        elif kind == "unmeasured":
            self._unmeasured.append(
                Unmeasured(step=event["step"], gpus=tuple(event["gpus"]), reason=event["reason"])
            )
        elif kind == "done":
            self.done = True
        elif kind == "result":
            self._result(event["kind"], dict(event["value"]))

    def _result(self, kind: str, value: dict[str, Any]) -> None:
        if kind == "versions":
            value["arch_list"] = tuple(value["arch_list"])
            self._versions = TorchVersions(**value)
        elif kind == "device":
            value["capability"] = tuple(value["capability"])
            self._devices.append(WorkerDevice(**value))
        elif kind == "link":
            self._links[value["source"], value["target"]] = (value["link"], value["topology"])
        elif kind == "upload":
            self._uploads[value["gpu"]] = Upload(**value)
        elif kind == "pair":
            link, topology = self._links.get((value["source"], value["target"]), ("unknown", ""))
            pair = PairCopy(**value, link=link, topology=topology)
            self._pairs[pair.source, pair.target] = pair
        elif kind == "chain":
            value["order"] = tuple(value["order"])
            value["wrong_hop"] = tuple(value["wrong_hop"]) if value["wrong_hop"] else None
            self._chains.append(ChainCopy(**value))
        elif kind == "product":
            self._products.append(Product(**value))
        elif kind == "load":
            self._speed(value["gpu"], tflop_per_s=value["tflop_per_s"])
        elif kind == "memory speed":
            self._speed(value["gpu"], memory_gb_per_s=value["gb_per_s"])
        elif kind == "host speed":
            gpu = value["gpu"]
            self._uploads[gpu] = replace(self._uploads[gpu], gb_per_s=value["gb_per_s"])
        elif kind == "pair speed":
            at = value["source"], value["target"]
            self._pairs[at] = replace(self._pairs[at], gb_per_s=value["gb_per_s"])

    def _speed(self, gpu: int, **values: Any) -> None:
        self._speeds[gpu] = replace(self._speeds.get(gpu, GpuSpeed(gpu=gpu)), **values)

    def build(self, *, ending: tuple[str, str] | None, seconds: float) -> WorkerReport:
        """:param ending: how the worker ended, ``("hung", "; killed after 30 s")``: the step
        and the GPUs are said in between. None if it ended well."""
        failure: str | None = None
        step: str | None = None
        gpus: tuple[int, ...] = ()
        if ending is not None:
            what, more = ending
            where = f"after step {self._last!r}"
            if self._open is not None:
                step, gpus, path = self._open
                where = f"at step {step!r}{on_gpus(gpus, path)}"
            failure = f"the CUDA worker {what} {where}{more}"
        return WorkerReport(
            failure=failure,
            failed_step=step,
            failed_gpus=gpus,
            versions=self._versions,
            devices=tuple(self._devices),
            uploads=tuple(self._uploads.values()),
            pairs=tuple(self._pairs.values()),
            chains=tuple(self._chains),
            products=tuple(self._products),
            speeds=tuple(self._speeds.values()),
            steps=tuple(self._steps),
            unmeasured=tuple(self._unmeasured),
            seconds=seconds,
        )


def on_gpus(gpus: Sequence[int], path: bool) -> str:
    """`` on GPU 0 -> GPU 1`` along a path, `` on GPU 0, GPU 1`` for a set, else empty."""
    if not gpus:
        return ""
    return " on " + (" -> " if path else ", ").join(f"GPU {gpu}" for gpu in gpus)
