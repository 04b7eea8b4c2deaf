from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.errors import CheckpointError
from pytest_multigpu.model.reader import ReadAhead, ReadJob
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
