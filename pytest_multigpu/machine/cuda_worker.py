"""The CUDA worker: a process that touches the GPUs so that pytest's own process need not.

``cuda_main.py`` runs it: it writes events (``cuda/emitter.py``), one JSON object a line, and ends.
It never outlives its parent: it ends when stdin closes, and a watchdog that needs no interpreter
lock ends it after ``--timeout`` seconds.

Imports the standard library and ``machine.cuda`` only; torch when it is time.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TextIO

from ..importing import uncollected
from .cuda.emitter import Emitter, GpuError, one_line

if TYPE_CHECKING:
    from .cuda.backend import Backend
    from .cuda.copies import Pattern
    from .cuda.links import NvmlSide

MIB = 1 << 20
NVML_WAIT_S = 2.0
ROOM_BYTES = 384 * MIB
"""Beside the copy buffers: operands and products of the arithmetic, workspaces."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cuda_worker", allow_abbrev=False)
    parser.add_argument("--devices", default="cuda", help="cuda, or cpu,cpu,cpu for stand-ins")
    parser.add_argument("--copy-bytes", type=int, default=64 * MIB)
    parser.add_argument("--memory-bytes", type=int, help="buffer for the memory speed")
    parser.add_argument("--load-seconds", type=float, default=0.12)
    parser.add_argument(
        "--late-contexts", action="store_true", help="make no context before torch is imported"
    )
    parser.add_argument("--timeout", type=float, default=120.0)
    return parser.parse_args(argv)


def main(
    argv: Sequence[str] | None = None, *, wrap: Callable[[Backend], Backend] | None = None
) -> int:
    """Run all steps; 0 if all came through, 1 after a ``failed`` event.

    :param wrap: put between the steps and the devices; tests plant faults with it.
    """
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    out = _take_stdout()
    _end_with_parent(arguments.timeout)
    emitter = Emitter(out)
    try:
        _steps(arguments, emitter, wrap)
    except GpuError as error:
        emitter.emit("failed", step=emitter.step_name, gpus=list(error.gpus), reason=str(error))
        return 1
    except Exception as error:
        emitter.emit("failed", step=emitter.step_name, gpus=[], reason=one_line(error))
        return 1
    emitter.emit("done")
    return 0


def _take_stdout() -> TextIO:
    """The real stdout for events alone; whatever else prints goes to stderr."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def _end_with_parent(timeout_s: float) -> None:
    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    # A C thread: ends the process even while a driver call holds the interpreter lock.
    faulthandler.dump_traceback_later(timeout_s, exit=True)


def _steps(
    arguments: argparse.Namespace,
    emitter: Emitter,
    wrap: Callable[[Backend], Backend] | None,
) -> None:
    from .cuda.copies import BUFFERS, make_pattern
    from .cuda.early import EarlyContexts
    from .cuda.links import NvmlSide

    if arguments.devices == "cuda":
        # cuBLAS would round fp32 products to TF32 whatever torch asks for, and every GPU would
        # seem to compute wrong numbers. It reads this once; the products here are checked exactly.
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    nvml = NvmlSide().start()
    early = EarlyContexts()
    if arguments.devices == "cuda" and not arguments.late_contexts:
        early.start()
    with emitter.step("import torch"), uncollected():
        import torch  # noqa: F401  (what it costs is a step of its own)
    with emitter.step("CUDA start"):
        early.wait_for_driver()
        backend = _backend(arguments.devices, emitter)
    if backend is None:
        return
    if wrap is not None:
        backend = wrap(backend)
    gpus = range(backend.count)
    nvml.wait(NVML_WAIT_S)

    def open_context(gpu: int) -> None:
        early.wait_for(gpu)
        backend.open(gpu)

    with emitter.step("contexts", gpus), ThreadPoolExecutor(max_workers=1) as pool:
        # The random numbers take the CPU while the contexts take the driver.
        making = pool.submit(make_pattern, arguments.copy_bytes)
        emitter.each(gpus, open_context)
        pattern = making.result()
    with emitter.step("devices", gpus):
        need = BUFFERS * arguments.copy_bytes + ROOM_BYTES
        fit = _devices(backend, emitter, nvml, need)
    if fit:
        _measure(arguments, backend, emitter, pattern, fit)


def _measure(
    arguments: argparse.Namespace,
    backend: Backend,
    emitter: Emitter,
    pattern: Pattern,
    gpus: Sequence[int],
) -> None:
    """:param gpus: those with room for it."""
    from .cuda import arithmetic
    from .cuda.copies import CopyTest

    copies = CopyTest(backend, emitter, pattern, gpus)
    with emitter.step("host buffer"):
        pinned = backend.host_buffer(arguments.copy_bytes)
    with emitter.step("uploads", gpus):
        copies.upload(pinned)
    with emitter.step("copies", gpus):
        copies.pairs()
    with emitter.step("chains", gpus):
        copies.chains()
    with emitter.step("arithmetic", gpus):
        arithmetic.products(backend, emitter, copies.uploaded, pattern.words)
    with emitter.step("load", gpus):
        arithmetic.load(backend, emitter, copies.uploaded, arguments.load_seconds)
    with emitter.step("memory speed", gpus):
        arithmetic.memory_speeds(backend, emitter, gpus, arguments.memory_bytes)
    with emitter.step("host speed", gpus):
        copies.host_speeds(pinned)
    with emitter.step("pair speed", gpus):
        copies.pair_speeds()


def _backend(devices: str, emitter: Emitter) -> Backend | None:
    """The devices to test, and the versions; None if CUDA has no device to give."""
    import torch

    from .cuda.backend import CpuBackend, CudaBackend

    backend: Backend | None = None
    problem: str | None = None
    if devices == "cuda":
        try:
            if torch.version.cuda is None:
                problem = f"torch {torch.__version__} was built without CUDA"
            else:
                torch.cuda.init()
                backend = CudaBackend()
        except Exception as error:
            # Whatever CUDA's start raises is the finding; the visibility check reports it.
            problem = one_line(error)
    else:
        backend = CpuBackend(len(devices.split(",")))
    emitter.result(
        "versions",
        torch=torch.__version__,
        cuda=torch.version.cuda,
        arch_list=torch.cuda.get_arch_list() if devices == "cuda" and backend else [],
        problem=problem,
    )
    return backend if backend is not None and backend.count else None


def _devices(backend: Backend, emitter: Emitter, nvml: NvmlSide, need_bytes: int) -> list[int]:
    """Report every device and link; the devices with enough free memory to go on.

    The others are unmeasured: a small card that drives a display must not hide what the rest do.
    """
    identities = [backend.identity(gpu) for gpu in range(backend.count)]
    fit: list[int] = []
    for gpu, identity in enumerate(identities):
        free = backend.free_bytes(gpu)
        emitter.result(
            "device",
            index=gpu,
            uuid=identity.uuid,
            name=identity.name,
            capability=list(identity.capability),
            total_bytes=identity.total_bytes,
            free_bytes=free,
        )
        if free >= need_bytes:
            fit.append(gpu)
        else:
            emitter.unmeasured(
                [gpu],
                f"GPU {gpu} has {free // MIB} MiB free; copies and arithmetic "
                f"need {need_bytes // MIB} MiB",
            )
        for other, its in enumerate(identities):
            if other != gpu:
                link, topology = nvml.link(
                    identity.uuid, its.uuid, backend.can_access_peer((gpu, other))
                )
                emitter.result("link", source=gpu, target=other, link=link, topology=topology)
    return fit
