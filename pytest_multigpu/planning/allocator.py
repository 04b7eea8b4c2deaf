"""What PyTorch's CUDA caching allocator would hold, without a GPU. Imports the standard library.

NVML shows what the allocator has taken from the driver, not what tensors use, and on a long
prompt the two differ by gigabytes. So the planner replays a model's allocations through the
allocator's own rules (``c10/cuda/CUDACachingAllocator.cpp``, default settings, one stream; with
expandable segments: :mod:`.expandable`):

* sizes are rounded up to 512 bytes; up to 1 MiB they come from the small pool;
* the driver is asked for 2 MiB (small pool), 20 MiB (below 10 MiB), else a multiple of 2 MiB;
* the smallest free block that is large enough is taken, at equal size the lowest address
  (the driver's to choose: see ``TOP_DOWN``);
* a block is split if 512 bytes (small pool) or more than 1 MiB (large pool) would be left;
* a freed block joins its free neighbours, and stays with the allocator;
* when the driver has no more, every wholly free segment is given back and it asks once more.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from copy import copy
from typing import TypeVar

from ..units import MIB

ROUND = 512
SMALL = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
MIN_LARGE = 10 * MIB
ROUND_LARGE = 2 * MIB
TOP_DOWN = 0
"""Segments from that size on get lower addresses from the driver the later they are asked for,
smaller ones higher addresses. All of them: every segment that one H200 or two (driver 580) gave a
70B for prompts of 2,048 to 32,768 tokens follows from that, one after the other. Not so in a
process that gave segments back before: GPUs share one range of addresses, a small segment in the
tail of a large one's keeps that one's place, and what fits there is given out first."""
OTHER_ORDERS = (512 * MIB, 1 << 50)
"""Some of them top down; none."""
_HIGHEST = 1 << 62


class Held:
    """A block of device memory: handed out, or free and kept by the allocator."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(
        self,
        address: int,
        size: int,
        small: bool,
        free: bool = False,
        before: Held | None = None,
        after: Held | None = None,
    ) -> None:
        self.address = address
        self.size = size
        self.small = small
        self.free = free
        self.before = before
        self.after = after


_Entry = tuple[int, int, Held]
"""Size, address and the block itself, which is never compared: no two have one address."""

_Self = TypeVar("_Self", bound="Allocator")


class Allocator:
    """One GPU's caching allocator.

    :param limit_bytes: what the driver can give it; None for no limit.
    :param top_down: size from which segments come top down.
    """

    _kept_whole = SMALL
    """Bytes of the large pool that are not split off a block."""

    def __init__(
        self,
        limit_bytes: int | None = None,
        *,
        top_down: int = TOP_DOWN,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.top_down = top_down
        self.missing_bytes = 0
        """What the driver lacked when it first ran out, even after every free segment was given
        back. From there on there is no limit."""
        self.reserved = 0
        self.peak_reserved = 0
        self.least_limit = 0
        """About the least limit that would have done: what was reserved when a segment was asked
        for, less the free segments that the driver would have been given back for it."""
        self.allocated = 0
        self.peak_allocated = 0
        self.kv = self.logits = 0
        """Bytes of what is handed out that are KV cache, and logits: their makers keep count."""
        self.peak_kv = self.peak_logits = 0
        """The same when ``allocated`` was at its peak."""
        self._next_address = 0
        self._whole_free = 0
        """Bytes of segments of which nothing is handed out."""
        self._free: tuple[list[_Entry], list[_Entry]] = ([], [])
        """Free blocks of the large and of the small pool, sorted."""

    # A plan takes and drops 10,000 blocks: take() and drop() are written for speed.

    def take(self, size: int) -> Held:
        """Memory for a tensor of ``size`` bytes."""
        size = -(-size // ROUND) * ROUND or ROUND
        small = size <= SMALL
        block = self._fitting(size, small)
        after = block.after
        if after is None and block.before is None:
            self._whole_free -= block.size
        block.free = False
        left = block.size - size
        if left > (0 if small else self._kept_whole):
            address = block.address + size
            rest = Held(address, left, small, True, block, after)
            if after is not None:
                after.before = rest
            block.after, block.size = rest, size
            insort(self._free[small], (left, address, rest))
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
            self.peak_kv, self.peak_logits = self.kv, self.logits
        return block

    def drop(self, block: Held) -> None:
        """The tensor is gone; its memory stays with the allocator."""
        size = block.size
        self.allocated -= size
        block.free = True
        pool = self._free[block.small]
        before, after = block.before, block.after
        if before is not None and before.free:
            address = before.address
            del pool[bisect_left(pool, (before.size, address))]
            block.address = address
            size += before.size
            block.before = before = before.before
            if before is not None:
                before.after = block
        if after is not None and after.free:
            del pool[bisect_left(pool, (after.size, after.address))]
            size += after.size
            block.after = after = after.after
            if after is not None:
                after.before = block
        block.size = size
        if before is None and after is None:
            self._whole_free += size
        insort(pool, (size, block.address, block))

    def empty_cache(self) -> None:
        """``torch.cuda.empty_cache()``: wholly free segments go back to the driver."""
        for pool in self._free:
            pool[:] = [entry for entry in pool if not _is_segment(entry[2])]
        self.reserved -= self._whole_free
        self._whole_free = 0

    def limit_to(self, limit_bytes: int) -> None:
        """From here on the driver has no more than that, since something else than a tensor takes
        the rest: nothing is given back for it, so what is held beyond it is missing now."""
        self.limit_bytes = limit_bytes
        if self.reserved > limit_bytes:
            self._run_out(0)

    def restart_peaks(self) -> None:
        """``torch.cuda.reset_peak_memory_stats()``."""
        self.peak_reserved = self.reserved
        self.restart_allocated_peak()

    def restart_allocated_peak(self) -> None:
        """``peak_reserved`` goes on."""
        self.peak_allocated = self.allocated
        self.peak_kv, self.peak_logits = self.kv, self.logits

    def copy(self: _Self) -> _Self:
        """The same state once more, to go on from it in another way.

        What is handed out by now is shared: neither may drop it any more.
        """
        twin = copy(self)
        twin._free = ([], [])
        for pool, copied in zip(self._free, twin._free, strict=True):
            for size, address, block in pool:
                held = Held(address, size, block.small, True, block.before, block.after)
                copied.append((size, address, held))
        return twin

    def _fitting(self, size: int, small: bool) -> Held:
        """A block to cut ``size`` bytes from, out of its pool."""
        pool = self._free[small]
        at = bisect_left(pool, (size,))
        return pool.pop(at)[2] if at < len(pool) else self._segment(size, small)

    def _segment(self, size: int, small: bool) -> Held:
        """A new segment from the driver, to be handed out at once."""
        if small:
            size = SMALL_SEGMENT
        elif size < MIN_LARGE:
            size = LARGE_SEGMENT
        else:
            size = -(-size // ROUND_LARGE) * ROUND_LARGE
        self.least_limit = max(self.least_limit, self.reserved - self._whole_free + size)
        if self._lacks(size):
            self.empty_cache()
            if self._lacks(size):
                self._run_out(size)
        self.reserved += size
        self._whole_free += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        at = self._next_address
        self._next_address += size
        return Held(_HIGHEST - at - size if size >= self.top_down else at, size, small)

    def _lacks(self, size: int) -> bool:
        """The driver has no ``size`` bytes left."""
        return self.limit_bytes is not None and self.reserved + size > self.limit_bytes

    def _run_out(self, size: int) -> None:
        assert self.limit_bytes is not None
        self.missing_bytes = self.reserved + size - self.limit_bytes
        self.limit_bytes = None


class Elsewhere(Allocator):
    """Of a GPU that is not replayed: keeps nothing."""

    def take(self, size: int) -> Held:
        return _NOTHING

    def drop(self, block: Held) -> None:
        pass


_NOTHING = Held(0, 0, small=False)


def _is_segment(block: Held) -> bool:
    return block.before is None and block.after is None
