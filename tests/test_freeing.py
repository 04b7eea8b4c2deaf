"""A failed test's tensors go with it, whatever its exception was raised from."""

from __future__ import annotations

import weakref

import pytest

from pytest_multigpu.freeing import clear_failure, ran_out_of_memory


class Tensor:
    pass


def held(raise_it: str) -> tuple[BaseException, list[weakref.ref[Tensor]]]:
    refs = []

    def inner() -> None:
        tensor = Tensor()
        refs.append(weakref.ref(tensor))
        raise MemoryError("no room")

    def outer() -> None:
        tensor = Tensor()
        refs.append(weakref.ref(tensor))
        try:
            inner()
        except MemoryError as error:
            if raise_it == "cause":
                raise RuntimeError("wrapped") from error
            if raise_it == "context":
                raise RuntimeError("while handling")  # noqa: B904
            raise

    try:
        outer()
    except Exception as error:
        return error, refs
    raise AssertionError


@pytest.mark.parametrize("raise_it", ["plain", "cause", "context"])
def test_frames_are_cleared(raise_it: str) -> None:
    error, refs = held(raise_it)
    assert all(ref() is not None for ref in refs)
    clear_failure(error)
    assert [ref() for ref in refs] == [None, None]


def test_a_ring_of_causes_ends() -> None:
    one, two = ValueError(), ValueError()
    one.__cause__, two.__cause__ = two, one
    clear_failure(one)


def test_what_counts_as_out_of_memory() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert ran_out_of_memory(OutOfMemoryError("CUDA out of memory."))
    assert ran_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"))
    assert not ran_out_of_memory(RuntimeError("shapes differ"))
