"""A CUDA worker that never was a process: its report is there at once."""

from __future__ import annotations

from pytest_multigpu.records.worker import WorkerReport


class Handle:
    """In place of a worker's process."""

    def __init__(self) -> None:
        self.closed = False
        self.failure: str | None = None

    def result(self) -> WorkerReport:
        return WorkerReport(failure="ended" if self.closed else self.failure, seconds=1.0)

    def close(self) -> None:
        self.closed = True
