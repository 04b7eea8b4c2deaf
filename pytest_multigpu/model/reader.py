"""Parallel reads into pinned memory, and from there to each tensor's own device.

Threads claim chunks in the order in which the tensors will be asked for. Each thread has one
pinned buffer: it reads a chunk, waits until the tensor has a place on its device, copies and
waits for the copy. So host memory is bounded by threads times chunk size. Tensors that will be
quantised land in a few scratch slots per device, which are handed on once quantised: the GPU
never holds more than those in 16 bit, and the allocator is left without holes.

Imports errors, units and the sibling :mod:`.read_jobs`; torch in functions.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import CheckpointError
from ..units import MIB
from .read_jobs import (
    Lane,
    PendingTensor,
    ReadJob,
    bytes_of,
    flat_bytes,
    memory,
    pinned_memory,
    typed,
)

THREADS = 16
"""8 threads reach half the rate of 16 from page cache (measured on 4 x H100)."""
CHUNK_BYTES = 64 * MIB
SLOTS = 2
"""One scratch slot is filled while the other is quantised."""


class ReadAhead:
    """Reads ``jobs`` in order with threads of its own.

    A context manager: entering opens the files and takes the scratch memory, :meth:`start`
    begins to read, leaving stops the threads and lets go of everything.

    :param report: called with the bytes that have just arrived, from any thread.
    """

    def __init__(
        self,
        jobs: Sequence[ReadJob],
        *,
        report: Callable[[int], None] = lambda _: None,
        threads: int = THREADS,
        chunk_bytes: int = CHUNK_BYTES,
        slots: int = SLOTS,
    ) -> None:
        self._jobs = list(jobs)
        self._report = report
        largest = max((job.stored.size_bytes for job in jobs), default=0)
        self._chunk_bytes = max(1, min(chunk_bytes, largest))
        chunks = sum(-(-job.stored.size_bytes // self._chunk_bytes) for job in jobs)
        self._threads_wanted = min(threads, max(chunks, 1))
        self._slots = slots
        self._lock = threading.Condition()
        self._cursor = (0, 0)
        self._stop = False
        self._error: BaseException | None = None
        self._files: dict[str, int] = {}
        self._lanes: dict[Any, Lane] = {}
        self._streams: dict[Any, Any] = {}
        self._workers: list[threading.Thread] = []

    # -- life ------------------------------------------------------------------------------

    def __enter__(self) -> ReadAhead:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def start(self) -> None:
        for number in range(self._threads_wanted):
            worker = threading.Thread(target=self._work, name=f"read-{number}", daemon=True)
            self._workers.append(worker)
            worker.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        # All files at once: one that is deleted from here on can still be read.
        for path in dict.fromkeys(job.stored.path for job in self._jobs):
            try:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        largest: dict[Any, int] = {}
        for job in self._jobs:
            job.left_bytes = job.stored.size_bytes
            if job.quantised and job.stored.size_bytes:
                largest[job.device] = max(largest.get(job.device, 0), job.stored.size_bytes)
            if job.device.type == "cuda" and job.device not in self._streams:
                self._streams[job.device] = _cuda().Stream(device=job.device)
        for device, size in largest.items():
            mine = [
                job
                for job in self._jobs
                if job.quantised and job.device == device and job.stored.size_bytes
            ]
            lane = Lane(device, size, min(self._slots, len(mine)))
            lane.waiting.extend(mine)
            self._lanes[device] = lane

    def close(self) -> None:
        """Stop and join the threads, close the files, let go of every tensor."""
        # An interrupt between taking the lock and entering its block leaves it with this thread,
        # and the workers would wait for it for ever.
        with contextlib.suppress(RuntimeError):
            while True:
                self._lock.release()
        with self._lock:
            self._stop = True
            self._lock.notify_all()
        for worker in self._workers:
            if worker.ident is not None:
                worker.join()
        self._workers.clear()
        for job in self._jobs:
            job.tensor = None
            job.ready.set()
        self._lanes.clear()
        self._streams.clear()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def fail(self, error: BaseException) -> None:
        """Stop reading; everyone who waits for a tensor gets ``error``."""
        with self._lock:
            if self._error is None:
                self._error = error
            self._stop = True
            self._lock.notify_all()
        for job in self._jobs:
            job.ready.set()

    @property
    def error(self) -> BaseException | None:
        return self._error

    # -- the consumer ----------------------------------------------------------------------

    def pending(self, job: ReadJob) -> PendingTensor:
        return PendingTensor(job, self._wait)

    def _wait(self, job: ReadJob) -> Any:
        """The tensor of ``job``, complete on its device.

        :raises CheckpointError: it could not be read.
        """
        job.ready.wait()
        if self._error is not None:
            raise self._error
        tensor, job.tensor = job.tensor, None
        if tensor is None:
            raise RuntimeError(f"{job.stored.name} was asked for twice, or after the end")
        return tensor

    def consumed(self, job: ReadJob) -> None:
        """The work that reads ``job``'s slot has been issued: the slot may be handed on."""
        if job.slot is None:
            return
        lane = self._lanes[job.device]
        event = None
        if job.device.type == "cuda":
            event = _cuda().Event()
            event.record(_cuda().current_stream(job.device))
        with self._lock:
            lane.after[job.slot] = event
            lane.free.append(job.slot)
            job.slot = None
            self._lock.notify_all()

    # -- the threads -----------------------------------------------------------------------

    def _work(self) -> None:
        buffer: Any = None
        view: Any = None
        try:
            while (claim := self._claim()) is not None:
                job, start, count = claim
                if job.device.type == "cpu":
                    place = self._place(job)
                    if place is None:
                        return
                    self._read(job, start, bytes_of(place)[start : start + count])
                else:
                    if buffer is None:
                        buffer, view = self._pinned()
                    self._read(job, start, view[:count])
                    place = self._place(job)
                    if place is None:
                        return
                    self._copy(job, place[start : start + count], buffer[:count])
                self._arrived(job, count)
        except BaseException as error:
            self.fail(error)

    def _claim(self) -> tuple[ReadJob, int, int] | None:
        with self._lock:
            index, start = self._cursor
            while index < len(self._jobs) and start >= self._jobs[index].stored.size_bytes:
                if self._jobs[index].stored.size_bytes == 0:
                    self._empty(self._jobs[index])
                index, start = index + 1, 0
            if self._stop or index >= len(self._jobs):
                self._cursor = (index, start)
                return None
            job = self._jobs[index]
            count = min(self._chunk_bytes, job.stored.size_bytes - start)
            self._cursor = (index, start + count)
            return job, start, count

    def _empty(self, job: ReadJob) -> None:
        job.tensor = typed(self._allocate(job), job.stored)
        job.ready.set()

    def _pinned(self) -> tuple[Any, Any]:
        # Pinning enters the current device; device 0 may not be ours.
        with _cuda().device(next(iter(self._streams))):
            buffer = pinned_memory(self._chunk_bytes)
        return buffer, bytes_of(buffer)

    def _read(self, job: ReadJob, start: int, view: Any) -> None:
        stored = job.stored
        descriptor = self._files[stored.path]
        done = 0
        while done < len(view):
            if self._stop:
                return
            position = stored.offset + start + done
            try:
                count = os.preadv(descriptor, [view[done:]], position)
            except OSError as error:
                raise CheckpointError(
                    f"{stored.path}: reading {stored.name} at byte {position} failed: "
                    f"{error.strerror}; check the disk, or download the file again"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{stored.path}: ends at byte {position}, in the middle of {stored.name}: "
                    "it has become shorter since loading began; download it again"
                )
            done += count

    def _place(self, job: ReadJob) -> Any:
        """Flat uint8 view of where ``job`` goes; waits for a scratch slot. None when stopped."""
        with self._lock:
            while not self._stop:
                if job.tensor is not None:
                    return flat_bytes(job.tensor)
                if not job.quantised:
                    job.tensor = typed(self._allocate(job), job.stored)
                else:
                    self._hand_out(self._lanes[job.device])
                    if job.tensor is None:
                        self._lock.wait()
            return None

    def _hand_out(self, lane: Lane) -> None:
        """Free slots to the next jobs in order: out of order, two threads could wait for ever."""
        while lane.free and lane.waiting:
            job, slot = lane.waiting.popleft(), lane.free.popleft()
            job.slot = slot
            if lane.after[slot] is not None:
                self._streams[job.device].wait_event(lane.after[slot])
            job.tensor = typed(lane.buffers[slot][: job.stored.size_bytes], job.stored)
            self._lock.notify_all()

    def _allocate(self, job: ReadJob) -> Any:
        tensor = memory(job.stored.size_bytes, job.device)
        if job.device.type == "cuda":
            # The allocator may hand out memory that work on the default stream still reads.
            self._streams[job.device].wait_stream(_cuda().default_stream(job.device))
        return tensor

    def _copy(self, job: ReadJob, target: Any, source: Any) -> None:
        cuda, stream = _cuda(), self._streams[job.device]
        with cuda.device(job.device), cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event = cuda.Event(blocking=True)  # 16 threads must not spin
            event.record(stream)
        event.synchronize()  # releases the GIL; after it the buffer is free

    def _arrived(self, job: ReadJob, count: int) -> None:
        with self._lock:
            job.left_bytes -= count
            complete = job.left_bytes == 0
        if complete and not self._stop:
            job.ready.set()
        self._report(count)


def _cuda() -> Any:
    import torch

    return torch.cuda  # partly untyped
