"""The parent's side of the CUDA worker: starts it, reads its lines, ends it in time.

This process never imports torch and never has a CUDA context. Imports records, units and errors.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import MachineError
from ..records.worker import WorkerReport
from ..units import MIB
from .worker_report import ReportBuilder

COMMAND = (sys.executable, "-u", str(Path(__file__).with_name("cuda_main.py")))
DEFAULT_TIMEOUT_S = 90.0
DEFAULT_COPY_BYTES = 64 * MIB
_STDERR_LINES = 20
_REAP_S = 5.0
"""How long a killed worker may take to vanish; a driver call may hold it for ever."""

Event = Mapping[str, Any]


def start_worker(
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    copy_bytes: int = DEFAULT_COPY_BYTES,
    devices: str = "cuda",
    command: Sequence[str] = COMMAND,
    arguments: Sequence[str] = (),
    on_event: Callable[[Event], None] | None = None,
) -> WorkerHandle:
    """Start the worker at once and return; its environment is this process's, unchanged.

    :param timeout_s: hard limit from now until the worker has ended.
    :param copy_bytes: bytes of one copy, a multiple of 16; below 64 MiB wrong copies can hide.
    :param devices: ``cuda``, or ``cpu,cpu`` for CPU tensors that stand in for two GPUs.
    :param command: another main with the same arguments; tests plant faults with it.
    :param arguments: appended as they are.
    :param on_event: called from the reading thread with every event (``cuda/emitter.py``), to
        sample health while a step runs. What it raises goes into ``handle.listener_error``.
    :raises MachineError: the process could not be started.
    """
    if copy_bytes < 4096 or copy_bytes % 16:
        raise ValueError(f"copy_bytes is {copy_bytes}; it must be a multiple of 16, at least 4096")
    line = [
        *command,
        f"--devices={devices}",
        f"--copy-bytes={copy_bytes}",
        # The worker's own watchdog, should this process not live to kill it.
        f"--timeout={timeout_s + _REAP_S}",
        *arguments,
    ]
    try:
        process = subprocess.Popen(
            line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise MachineError(f"the CUDA worker could not be started: {error}") from error
    return WorkerHandle(process, timeout_s=timeout_s, on_event=on_event)


class WorkerHandle:
    """A running worker. ``result()`` waits for it; ``close()`` ends it without waiting."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        timeout_s: float,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self._process = process
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self._on_event = on_event
        self._lock = threading.Lock()
        self._builder = ReportBuilder()
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._report: WorkerReport | None = None
        self._closed = False
        self.listener_error: Exception | None = None
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = (
            threading.Thread(target=self._read_events, args=(process.stdout,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(process.stderr,), daemon=True),
        )
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> tuple[str, ...]:
        """The last lines that the worker wrote there."""
        return tuple(self._stderr)

    def result(self) -> WorkerReport:
        """Wait until the worker has ended, at most until its hard limit; then it is killed.

        Returns a report in every case; ``failure`` says how the worker ended, if not well.
        """
        if self._report is not None:
            return self._report
        ending: tuple[str, str] | None = None
        left = self._began + self._timeout_s - time.monotonic()
        try:
            code = self._process.wait(timeout=max(0.0, left))
        except subprocess.TimeoutExpired:
            gone = self._kill()
            if self._closed:
                ending = "was ended", " before it was through"
            else:
                ending = "hung", f"; killed after {self._timeout_s:g} s"
            if not gone:
                ending = ending[0], f"{ending[1]}, but process {self.pid} cannot be ended"
        else:
            self._join_readers()
            if code != 0 or not self._builder.done:
                ending = self._ending(code)
        self._join_readers()
        with self._lock:
            self._report = self._builder.build(
                ending=ending, seconds=time.monotonic() - self._began
            )
        self._close_pipes()
        return self._report

    def close(self) -> None:
        """End the worker now if it still runs; afterwards ``result()`` tells that it was ended."""
        if self._report is None:
            self._closed = True
            self._timeout_s = min(self._timeout_s, time.monotonic() - self._began)
            self.result()

    def _ending(self, code: int) -> tuple[str, str]:
        if self._builder.failed_reason is not None:
            return "failed", f": {self._builder.failed_reason}"
        last = next((line for line in reversed(self._stderr) if line.strip()), "")
        tail = f": {last.strip()}" if last else ""
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"died ({signal.Signals(-code).name})", tail
            return f"died (signal {-code})", tail
        return f"died (exit code {code})", tail

    def _kill(self) -> bool:
        """Kill the worker's process group; False if it is still there afterwards."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(timeout=_REAP_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _join_readers(self) -> None:
        for reader in self._readers:
            reader.join(timeout=1.0)

    def _close_pipes(self) -> None:
        if any(reader.is_alive() for reader in self._readers):
            return
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read_events(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            try:
                event = json.loads(line)
                with self._lock:
                    self._builder.add(event)
            except (ValueError, TypeError, KeyError):
                # Cut short by a kill, or not the worker's: kept for the message.
                self._stderr.append(line.decode(errors="replace"))
                continue
            if self._on_event is not None:
                try:
                    self._on_event(event)
                except Exception as error:
                    # The listener's error must not stop the reading; it stays visible here.
                    self.listener_error = error
                    self._on_event = None

    def _read_stderr(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self._stderr.append(line.decode(errors="replace").rstrip())
