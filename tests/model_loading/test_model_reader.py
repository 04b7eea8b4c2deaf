from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.errors import CheckpointError
from pytest_multigpu.model.read_jobs import ReadJob
from pytest_multigpu.model.reader import ReadAhead
from pytest_multigpu.model.safetensors_index import StoredTensor


def jobs(tmp_path: Path, sizes: list[int], *, quantised: bool = False) -> list[ReadJob]:
    import torch

    path = tmp_path / "data.bin"
    path.write_bytes(b"".join(bytes([index % 251]) * size for index, size in enumerate(sizes)))
    result, offset = [], 0
    for index, size in enumerate(sizes):
        stored = StoredTensor(
            name=f"t{index}",
            path=str(path),
            offset=offset,
            size_bytes=size,
            dtype="U8",
            shape=(size,),
        )
        result.append(ReadJob(stored=stored, device=torch.device("cpu"), quantised=quantised))
        offset += size
    return result


def check(tensor: Any, index: int, size: int) -> None:
    assert tensor.tolist() == [index % 251] * size


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_every_byte_arrives(tmp_path: Path, threads: int, chunk: int, quantised: bool) -> None:
    sizes = [1, 20, 0, 64, 7, 65, 3]
    work = jobs(tmp_path, sizes, quantised=quantised)
    seen: list[int] = []
    reader = ReadAhead(work, report=seen.append, threads=threads, chunk_bytes=chunk)
    with reader:
        reader.start()
        for index, (job, size) in enumerate(zip(work, sizes, strict=True)):
            pending = reader.pending(job)
            assert pending.get_shape() == [size]
            assert pending.get_dtype() == "U8"
            check(pending[...], index, size)
            reader.consumed(job)
    assert sum(seen) == sum(sizes)


def test_scratch_holds_two_tensors_at_most(tmp_path: Path) -> None:
    work = jobs(tmp_path, [10] * 20, quantised=True)
    with ReadAhead(work, threads=8, chunk_bytes=4) as reader:
        reader.start()
        places = set()
        for index, job in enumerate(work):
            tensor = reader.pending(job)[...]
            places.add(tensor.data_ptr())
            check(tensor, index, 10)
            reader.consumed(job)
    assert len(places) == 2


def test_nothing_is_overwritten_before_it_is_consumed(tmp_path: Path) -> None:
    import time

    work = jobs(tmp_path, [10] * 6, quantised=True)
    with ReadAhead(work, threads=8) as reader:
        reader.start()
        first = reader.pending(work[0])[...]
        second = reader.pending(work[1])[...]
        time.sleep(0.05)
        check(first, 0, 10)
        check(second, 1, 10)
        assert not work[2].ready.is_set()
        reader.consumed(work[0])
        check(reader.pending(work[2])[...], 2, 10)
        check(second, 1, 10)


def test_leaving_early_stops_the_threads(tmp_path: Path) -> None:
    work = jobs(tmp_path, [10] * 50, quantised=True)
    with ReadAhead(work, threads=8) as reader:
        reader.start()
        reader.pending(work[0])[...]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-")]
    assert all(job.tensor is None for job in work)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    work = jobs(tmp_path, [4])
    path = tmp_path / "data.bin"
    path.unlink()
    with pytest.raises(CheckpointError) as caught, ReadAhead(work):
        pass
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory"


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    work = jobs(tmp_path, [4, 4])
    path = tmp_path / "data.bin"
    os.truncate(path, 6)
    with ReadAhead(work, threads=1) as reader:
        reader.start()
        reader_error = pytest.raises(CheckpointError)
        with reader_error as caught:
            for job in work:
                reader.pending(job)[...]
    assert str(caught.value) == (
        f"{path}: ends at byte 6, in the middle of t1: it has become shorter since loading "
        "began; download it again"
    )


def test_an_error_reaches_everyone_who_waits(tmp_path: Path) -> None:
    work = jobs(tmp_path, [4] * 4, quantised=True)
    with ReadAhead(work, threads=2) as reader:
        reader.start()
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                reader.pending(work[3])[...]
            except RuntimeError as error:
                caught.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        reader.fail(RuntimeError("stop"))
        waiter.join(5)
        assert [str(error) for error in caught] == ["stop"]


class FakeCuda:
    """Two GPUs in host memory, with streams and events that note what was asked of them."""

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.device, self.waited = device, 0

        def wait_event(self, event: Any) -> None:
            assert event.recorded
            self.waited += 1

        def wait_stream(self, stream: Any) -> None:
            assert stream.device == self.device

    class Event:
        def __init__(self, *, blocking: bool = False) -> None:
            self.recorded = False

        def record(self, stream: Any) -> None:
            self.recorded = True

        def synchronize(self) -> None:
            assert self.recorded

    def device(self, device: Any) -> Any:
        return contextlib.nullcontext()

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def current_stream(self, device: Any) -> Any:
        return self.Stream(device)

    default_stream = current_stream


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    index: int
    type: str = "cuda"


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("threads", [1, 16])
def test_through_pinned_buffers_to_two_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: bool, threads: int
) -> None:
    import torch

    from pytest_multigpu.model import read_jobs
    from pytest_multigpu.model import reader as module

    taken: list[tuple[Any, int]] = []

    def memory(size_bytes: int, device: Any) -> Any:
        taken.append((device, size_bytes))
        return torch.zeros(size_bytes, dtype=torch.uint8)

    pinned: list[int] = []

    def pinned_memory(size_bytes: int) -> Any:
        pinned.append(size_bytes)
        return torch.zeros(size_bytes, dtype=torch.uint8)

    monkeypatch.setattr(module, "_cuda", FakeCuda)
    monkeypatch.setattr(module, "memory", memory)
    monkeypatch.setattr(read_jobs, "memory", memory)
    monkeypatch.setattr(module, "pinned_memory", pinned_memory)
    sizes = [30, 7, 0, 64, 1, 64, 33, 12]
    work = jobs(tmp_path, sizes, quantised=quantised)
    for index, job in enumerate(work):
        job.device = FakeDevice(index // 4)
    with ReadAhead(work, threads=threads, chunk_bytes=16) as reading:
        reading.start()
        for index, (job, size) in enumerate(zip(work, sizes, strict=True)):
            check(reading.pending(job)[...], index, size)
            reading.consumed(job)
    assert 1 <= len(pinned) <= threads
    assert set(pinned) == {16}
    if quantised:  # two slots each, as large as the largest tensor there; zero bytes take none
        slots = [entry for entry in taken if entry[1]]
        assert slots == [(FakeDevice(0), 64)] * 2 + [(FakeDevice(1), 64)] * 2


def test_only_empty_tensors(tmp_path: Path) -> None:
    work = jobs(tmp_path, [0, 0])
    with ReadAhead(work) as reader:
        reader.start()
        assert [reader.pending(job)[...].numel() for job in work] == [0, 0]
