"""The order in which CUDA numbers the GPUs, asked of its driver.

Where cards of several models are mixed, CUDA numbers the fastest first and nvidia-smi does not;
only the driver knows how fast it takes them to be. It is asked in a process of its own, since it
reads the environment once, and through ``libcuda`` alone: no torch, no context, some 0.2 s.

This file is also the script that the process runs: it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

SECONDS = 10.0
"""A driver that has not answered by then hangs; the NVML order is then kept."""
_THAT_COUNT = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


def cuda_order(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """UUIDs of ``cuda:0``, ``cuda:1``, ... under ``environ``; None if CUDA does not say."""
    return _asked(*(environ.get(name) for name in _THAT_COUNT))


@lru_cache
def _asked(*values: str | None) -> tuple[str, ...] | None:
    environ = {name: text for name, text in os.environ.items() if name not in _THAT_COUNT}
    given = zip(_THAT_COUNT, values, strict=True)
    environ.update({name: value for name, value in given if value is not None})
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            env=environ,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return tuple(done.stdout.split())


def read_uuids(cuda: Any) -> list[str]:
    """UUIDs as NVML writes them, in CUDA's order.

    :param cuda: ``libcuda``.
    :raises OSError: the driver refuses; the text has its error code.
    """
    count, device = ctypes.c_int(0), ctypes.c_int(0)
    raw = (ctypes.c_ubyte * 16)()
    _call(cuda.cuInit, 0)
    _call(cuda.cuDeviceGetCount, ctypes.byref(count))
    found = []
    for gpu in range(count.value):
        _call(cuda.cuDeviceGet, ctypes.byref(device), gpu)
        _call(cuda.cuDeviceGetUuid, ctypes.byref(raw), device)
        found.append(f"GPU-{uuid.UUID(bytes=bytes(raw))}")
    return found


def _call(function: Any, *arguments: Any) -> None:
    code = function(*arguments)
    if code:
        raise OSError(f"CUDA error {code}")


if __name__ == "__main__":
    print(*read_uuids(ctypes.CDLL("libcuda.so.1")), sep="\n")
