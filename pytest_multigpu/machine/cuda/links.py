"""What NVML knows beside CUDA: the link of each pair.

Read in a thread while torch is imported, so it costs nothing. Whatever NVML cannot say stays
unknown. pynvml is imported inside functions only.
"""

from __future__ import annotations

import threading
from typing import Any

TOPOLOGY = {0: "INT", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
_P2P_NVLINK = 2
_P2P_OK = 0


class NvmlSide:
    """Handles by UUID."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._open, daemon=True)

    def start(self) -> NvmlSide:
        self._thread.start()
        return self

    def wait(self, timeout_s: float) -> None:
        """At most that long for NVML; a driver that hangs here leaves unknowns."""
        self._thread.join(timeout_s)

    def _open(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
        except Exception:
            # No NVML: links stay unknown; the NVML checks say why.
            return
        for index in range(count):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                self._handles[_text(pynvml.nvmlDeviceGetUUID(handle))] = handle
            except pynvml.NVMLError:
                continue  # a lost GPU; its entry stays missing, so unknown
        self._nvml = pynvml

    def link(self, source: str, target: str, peer: bool | None) -> tuple[str, str]:
        """``(link, topology)`` between two UUIDs; ``peer`` is what CUDA says of peer access."""
        if peer is None:
            return "unknown", ""
        nvlink = self._ask(source, target, self._has_nvlink)
        level = self._ask(source, target, self._ancestor)
        topology = TOPOLOGY.get(level, "") if level is not None else ""
        if not peer:
            return "CPU", topology
        if nvlink is None:
            return "unknown", topology
        return ("NVLink" if nvlink else "PCIe"), topology

    def _ask(self, source: str, target: str, question: Any) -> Any:
        if self._nvml is None or not {source, target} <= self._handles.keys():
            return None
        try:
            return question(self._handles[source], self._handles[target])
        except self._nvml.NVMLError:
            return None

    def _has_nvlink(self, first: Any, second: Any) -> bool:
        return bool(self._nvml.nvmlDeviceGetP2PStatus(first, second, _P2P_NVLINK) == _P2P_OK)

    def _ancestor(self, first: Any, second: Any) -> int:
        return int(self._nvml.nvmlDeviceGetTopologyCommonAncestor(first, second))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
