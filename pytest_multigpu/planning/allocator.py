"""What PyTorch's CUDA caching allocator would hold, without a GPU. Imports the standard library.

NVML shows what the allocator has taken from the driver, not what tensors use, and on a long
prompt the two differ by gigabytes. So the planner replays a model's allocations through the
allocator's own rules (``c10/cuda/CUDACachingAllocator.cpp``, default settings, one stream):

* sizes are rounded up to 512 bytes; up to 1 MiB they come from the small pool;
* the driver is asked for 2 MiB (small pool), 20 MiB (below 10 MiB), else a multiple of 2 MiB;
* the smallest free block that is large enough is taken, at equal size the lowest address;
* a block is split if 512 bytes (small pool) or more than 1 MiB (large pool) would be left;
* a freed block joins its free neighbours, and stays with the allocator;
* when the driver has no more, every wholly free segment is given back and it asks once more.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from ..units import MIB

ROUND = 512
SMALL = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
MIN_LARGE = 10 * MIB
ROUND_LARGE = 2 * MIB


class DeviceFullError(Exception):
    """The simulated driver has no more, even after every free segment was given back."""

    def __init__(self, missing_bytes: int) -> None:
        super().__init__(f"{missing_bytes} bytes short")
        self.missing_bytes = missing_bytes


class Held:
    """A block of device memory: handed out, or free and kept by the allocator."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address = address
        self.size = size
        self.small = small
        self.free = False
        self.before: Held | None = None
        self.after: Held | None = None


class Allocator:
    """One GPU's caching allocator.

    :param limit_bytes: what the driver can give it; None for no limit.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.reserved = 0
        self.peak_reserved = 0
        self.allocated = 0
        self.peak_allocated = 0
        self._next_address = 0
        self._free: dict[bool, list[tuple[int, int, Held]]] = {True: [], False: []}

    def take(self, size: int) -> Held:
        """Memory for a tensor of ``size`` bytes.

        :raises DeviceFullError: there is none within the limit.
        """
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small = size <= SMALL
        pool = self._free[small]
        at = bisect_left(pool, (size, -1))
        block = pool.pop(at)[2] if at < len(pool) else self._segment(size, small)
        block.free = False
        left = block.size - size
        if left >= ROUND if small else left > SMALL:
            self._split(block, size)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def drop(self, block: Held) -> None:
        """The tensor is gone; its memory stays with the allocator."""
        self.allocated -= block.size
        block.free = True
        before, after = block.before, block.after
        if before is not None and before.free:
            self._forget(before)
            block.address, block.size = before.address, before.size + block.size
            block.before = before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.free:
            self._forget(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        insort(self._free[block.small], (block.size, block.address, block))

    def empty_cache(self) -> None:
        """``torch.cuda.empty_cache()``: wholly free segments go back to the driver."""
        for small, pool in self._free.items():
            kept = [entry for entry in pool if not self._whole(entry[2])]
            self.reserved -= sum(entry[0] for entry in pool) - sum(entry[0] for entry in kept)
            self._free[small] = kept

    def restart_peaks(self) -> None:
        """``torch.cuda.reset_peak_memory_stats()``."""
        self.peak_reserved, self.peak_allocated = self.reserved, self.allocated

    @staticmethod
    def _whole(block: Held) -> bool:
        return block.before is None and block.after is None

    def _forget(self, block: Held) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]

    def _split(self, block: Held, size: int) -> None:
        rest = Held(block.address + size, block.size - size, block.small)
        rest.free = True
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.size = rest, size
        insort(self._free[block.small], (rest.size, rest.address, rest))

    def _segment(self, size: int, small: bool) -> Held:
        if small:
            size = SMALL_SEGMENT
        elif size < MIN_LARGE:
            size = LARGE_SEGMENT
        else:
            size = -(-size // ROUND_LARGE) * ROUND_LARGE
        limit = self.limit_bytes
        if limit is not None and self.reserved + size > limit:
            self.empty_cache()
            if self.reserved + size > limit:
                raise DeviceFullError(self.reserved + size - limit)
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        # A gap, so that two segments never look like neighbours.
        block = Held(self._next_address, size, small)
        self._next_address += size + ROUND_LARGE
        return block
