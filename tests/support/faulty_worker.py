"""The CUDA worker with a planted fault: a main beside the real one, for tests and campaigns.

``python -u faulty_worker.py --fault='{"kind": "copy", "pair": [0, 1], "how": "zero"}' ...``; all
other arguments go to the real worker. It works on real GPUs and on CPU stand-ins alike. Faults:

========================================================  =========================================
``{"kind": "copy", "pair": [s, t], "how": H}``            every copy from s to t; H is ``zero``,
                                                          ``stale`` or ``noise``
``{"kind": "chain", "pair": [s, t], "how": H}``           only from the second hop of a chain on
``{"kind": "upload", "gpu": g}``                          one byte from the host changes
``{"kind": "product", "gpu": g}``                         one bit of every product is flipped
``{"kind": "slow", "gpu": g, "times": n}``                does all timed work n times
``{"kind": "narrow", "gpu": g, "times": n}``              copies from the host n times
``{"kind": "full", "gpu": g}``                            shows 1 MiB free
``{"kind": K, "at": M, "gpus": [...]}``                   K is ``kill``, ``hang`` or ``raise``, at
                                                          the backend's method M on those GPUs
========================================================  =========================================
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pytest_multigpu.machine import cuda_worker
from pytest_multigpu.machine.cuda.copies import POISON_BYTE

if TYPE_CHECKING:
    import torch

    from pytest_multigpu.machine.cuda.backend import Backend


class FaultyBackend:
    """A backend with one fault; what the fault does not touch goes straight through."""

    def __init__(self, inner: Backend, fault: dict[str, Any]) -> None:
        self._inner = inner
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _is(self, kind: str, **where: object) -> bool:
        return self._fault["kind"] == kind and all(self._fault[k] == v for k, v in where.items())

    def _stop(self, method: str, *gpus: int) -> None:
        if self._fault.get("at") != method or self._fault["gpus"] != list(gpus):
            return
        if self._fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault["kind"] == "hang":
            time.sleep(3600)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    def _spoil(self, tensor: torch.Tensor) -> None:
        data = tensor.reshape(-1)[: max(1, tensor.numel() // 2)]
        if self._fault["how"] == "zero":
            data.zero_()
        elif self._fault["how"] == "stale":
            data.fill_(int.from_bytes(bytes([POISON_BYTE]) * 8, "little", signed=True))
        else:
            data.bitwise_xor_(0x0101010101010101)

    def open(self, gpu: int) -> None:
        self._stop("open", gpu)
        self._inner.open(gpu)

    def free_bytes(self, gpu: int) -> int:
        return 1 << 20 if self._is("full", gpu=gpu) else self._inner.free_bytes(gpu)

    def upload(self, out: torch.Tensor, host: torch.Tensor, gpu: int) -> None:
        self._stop("upload", gpu)
        for _ in range(self._fault["times"] if self._is("narrow", gpu=gpu) else 1):
            self._inner.upload(out, host, gpu)
        if self._is("upload", gpu=gpu):
            out[out.numel() // 3] ^= 1

    def copy_into(self, out: torch.Tensor, tensor: torch.Tensor, pair: tuple[int, int]) -> None:
        self._stop("copy_into", *pair)
        self._inner.copy_into(out, tensor, pair)
        if self._is("copy", pair=list(pair)):
            self._spoil(out)

    def send(self, tensor: torch.Tensor, pair: tuple[int, int], *, hop: int) -> torch.Tensor:
        self._stop("send", *pair)
        arrived = self._inner.send(tensor, pair, hop=hop)
        if self._is("copy", pair=list(pair)) or (self._is("chain", pair=list(pair)) and hop):
            self._spoil(arrived)
        return arrived

    def matmul(self, left: torch.Tensor, right: torch.Tensor, gpu: int) -> torch.Tensor:
        import torch

        self._stop("matmul", gpu)
        product = self._inner.matmul(left, right, gpu)
        if self._is("product", gpu=gpu):
            bits = torch.int16 if product.dtype == torch.bfloat16 else torch.int32
            product.view(bits)[1, 1] ^= 1
        return product

    def seconds_of(self, gpu: int, work: Callable[[], None]) -> float:
        def slowly() -> None:
            for _ in range(self._fault["times"]):
                work()

        return self._inner.seconds_of(gpu, slowly if self._is("slow", gpu=gpu) else work)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--fault", type=json.loads, required=True)
    own, others = parser.parse_known_args()
    return cuda_worker.main(
        others, wrap=lambda inner: cast("Backend", FaultyBackend(inner, own.fault))
    )


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
