"""The CUDA worker on CPU tensors that pass for the GPUs of ``machine/fake.py``; faults if asked.

``python -u standin_worker.py --gpus='[["GPU-...", "NVIDIA H100 80GB HBM3"]]' ...``: each copy and
each product is a real one; only who the devices are and how long work takes is told. Times come
from the bytes and operations of the work, so that a busy machine changes nothing. Other arguments
go to the real worker; ``--fault`` is ``faulty_worker.py``'s.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent))

from faulty_worker import FaultyBackend

from pytest_multigpu.machine import cuda_worker
from pytest_multigpu.machine.cuda.backend import CpuBackend, Identity

if TYPE_CHECKING:
    import torch

    from pytest_multigpu.machine.cuda.backend import Backend

COPY, HOST, MEMORY, PRODUCTS = 200e9, 54e9, 3.0e12, 600e12
"""Bytes and operations a second of a sound H100."""


class StandIn:
    """CPU tensors under the names of GPUs, with an H100's times."""

    def __init__(self, gpus: list[list[str]], arch_list: list[str]) -> None:
        self._inner = CpuBackend(len(gpus))
        self._gpus = gpus
        self.arch_list = arch_list
        self.count = len(gpus)
        self._seconds: defaultdict[int, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def identity(self, gpu: int) -> Identity:
        uuid, name = self._gpus[gpu]
        return Identity(uuid=uuid, name=name, capability=(9, 0), total_bytes=85_520_809_984)

    def can_access_peer(self, pair: tuple[int, int]) -> bool | None:
        return True

    def upload(self, out: torch.Tensor, host: torch.Tensor, gpu: int) -> None:
        self._inner.upload(out, host, gpu)
        self._seconds[gpu] += out.nbytes / HOST

    def copy_into(self, out: torch.Tensor, tensor: torch.Tensor, pair: tuple[int, int]) -> None:
        self._inner.copy_into(out, tensor, pair)
        self._seconds[pair[0]] += out.nbytes / COPY

    def copy_within(self, out: torch.Tensor, tensor: torch.Tensor, gpu: int) -> None:
        self._inner.copy_within(out, tensor, gpu)
        self._seconds[gpu] += 2 * out.nbytes / MEMORY

    def matmul(self, left: torch.Tensor, right: torch.Tensor, gpu: int) -> torch.Tensor:
        self._seconds[gpu] += 2 * left.shape[0] * left.shape[1] * right.shape[1] / PRODUCTS
        return self._inner.matmul(left, right, gpu)

    def seconds_of(self, gpu: int, work: Callable[[], None]) -> float:
        before = self._seconds[gpu]
        work()
        return self._seconds[gpu] - before


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--gpus", type=json.loads, required=True)
    parser.add_argument("--fault", type=json.loads, default=None)
    parser.add_argument("--arch-list", type=json.loads, default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--problem", default=None)
    own, others = parser.parse_known_args()

    def backend(_devices: str, emitter: Any) -> Backend | None:
        found = bool(own.gpus) and own.problem is None
        emitter.result(
            "versions",
            torch="2.11.0+cu128",
            cuda="12.8",
            arch_list=own.arch_list if found else [],
            problem=own.problem,
        )
        return cast("Backend", StandIn(own.gpus, own.arch_list)) if found else None

    module: Any = cuda_worker
    module._backend = backend
    wrap = None if own.fault is None else lambda inner: cast("Backend", _faulty(inner, own.fault))
    return cuda_worker.main([*others, "--late-contexts"], wrap=wrap)


def _faulty(inner: Any, fault: dict[str, Any]) -> FaultyBackend:
    return FaultyBackend(inner, fault)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
