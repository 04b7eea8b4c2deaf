"""The caching allocator with expandable segments. Imports its own part.

``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` gives each pool one range of addresses in
place of many segments, and maps memory into it page by page as it grows
(``c10/cuda/CUDACachingAllocator.cpp``: ``find_expandable_block``, ``map_block``, ``unmap_block``):

* pages are of 2 MiB in the small pool and of 20 MiB in the large one;
* a free block is chosen by what it could grow to, the least of those that are large enough;
* where none is, pages are mapped at the lowest addresses with that much room, free blocks counted;
* a block is split wherever 512 bytes are left;
* given back are the pages that lie wholly within free blocks.

What is cut from where hangs on nothing that the driver decides. The range is endless here, where
torch reserves 9/8 of the GPU's memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from .allocator import LARGE_SEGMENT, SMALL_SEGMENT, Allocator, Held

PAGES = (LARGE_SEGMENT, SMALL_SEGMENT)
"""Of the large and of the small pool."""
_RANGES = (0, 1 << 60)
_ENDLESS = 1 << 59


class _Unmapped(Held):
    """Addresses without memory behind them, whole pages of them. Never free: no block joins it."""

    __slots__ = ()


class ExpandableAllocator(Allocator):
    """One GPU's caching allocator with expandable segments.

    :param limit_bytes: what the driver can give it; None for no limit.
    """

    _kept_whole = 0

    def __init__(self, limit_bytes: int | None = None) -> None:
        super().__init__(limit_bytes)
        self._unmapped: tuple[list[_Unmapped], list[_Unmapped]] = (
            [_Unmapped(_RANGES[0], _ENDLESS, False)],
            [_Unmapped(_RANGES[1], _ENDLESS, True)],
        )
        """Of the large and of the small pool, by address. The last one has no end."""

    def empty_cache(self) -> None:
        """``torch.cuda.empty_cache()``: pages without anything in use go back to the driver."""
        for small in (False, True):
            for _, _, block in self._free[small].copy():
                self._unmap(block)

    def copy(self) -> ExpandableAllocator:
        """The same state once more; see :meth:`.Allocator.copy`."""
        twin = super().copy()
        free = {block.address: block for pool in twin._free for _, _, block in pool}
        unmapped: tuple[list[_Unmapped], list[_Unmapped]] = ([], [])
        for small, regions in enumerate(self._unmapped):
            for region in regions:
                same = _Unmapped(region.address, region.size, region.small)
                same.before, same.after = region.before, region.after
                unmapped[small].append(same)
                # Blocks in use are shared; what lies beside free ones is linked anew.
                if region.before is not None and region.before.free:
                    same.before = free[region.before.address]
                    same.before.after = same
                if region.after is not None and region.after.free:
                    same.after = free[region.after.address]
                    same.after.before = same
        twin._unmapped = unmapped
        return twin

    def _fitting(self, size: int, small: bool) -> Held:
        pool = self._free[small]
        at = bisect_left(pool, (size,))
        if at == len(pool):
            return self._grown(size, small)
        while at + 1 < len(pool) and _could_grow_to(pool[at + 1][2]) < _could_grow_to(pool[at][2]):
            at += 1
        return pool.pop(at)[2]

    def _grown(self, size: int, small: bool) -> Held:
        """A block of that size at least, mapped at the lowest addresses with room for it."""
        first = self._first_with_room(size, small)
        growth = sum(grown for _, grown in _to_map(first, size))
        kept = sum(_whole_pages(block)[1] for pool in self._free for _, _, block in pool)
        self.least_limit = max(self.least_limit, self.reserved - kept + growth)
        if self._lacks(growth):
            self.empty_cache()
            first = self._first_with_room(size, small)
            growth = sum(grown for _, grown in _to_map(first, size))
            if self._lacks(growth):
                self._run_out(growth)
        block = first
        for region, grown in _to_map(first, size):
            block = self._map(region, grown)
        self.reserved += growth
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._out_of_pool(block)
        return block

    def _first_with_room(self, size: int, small: bool) -> Held:
        for region in self._unmapped[small]:
            before = region.before
            first: Held = region if before is None or not before.free else before
            room, block = 0, first
            while room < size and (block.free or isinstance(block, _Unmapped)):
                room += block.size
                if block.after is None:
                    break
                block = block.after
            if room >= size:
                return first
        raise AssertionError("the last region has no end")

    def _map(self, region: _Unmapped, size: int) -> Held:
        """Memory behind the first ``size`` bytes of a region; a free block, joined with those
        beside it."""
        before: Held | None = region.before
        after: Held | None = region
        start = region.address
        region.address += size
        region.size -= size
        if not region.size:
            self._unmapped[region.small].remove(region)
            after = region.after
            if after is not None and after.free:
                self._out_of_pool(after)
                size += after.size
                after = after.after
        if before is not None and before.free:
            self._out_of_pool(before)
            start = before.address
            size += before.size
            before = before.before
        return self._add_free(start, size, region.small, before, after)

    def _unmap(self, block: Held) -> None:
        """Gives back the pages that lie wholly within a free block."""
        start, size = _whole_pages(block)
        if not size:
            return
        self._out_of_pool(block)
        self.reserved -= size
        small, before, after = block.small, block.before, block.after
        region = _Unmapped(start, size, small)
        left = start - block.address
        right = block.size - left - size
        if left:
            before = self._add_free(block.address, left, small, before, region)
        elif isinstance(before, _Unmapped):
            self._unmapped[small].remove(before)
            region.address = before.address
            region.size += before.size
            before = before.before
        if right:
            after = self._add_free(start + size, right, small, region, after)
        elif isinstance(after, _Unmapped):
            self._unmapped[small].remove(after)
            region.size += after.size
            after = after.after
        _link(before, region, after)
        insort(self._unmapped[small], region, key=lambda one: one.address)

    def _add_free(
        self, start: int, size: int, small: bool, before: Held | None, after: Held | None
    ) -> Held:
        block = Held(start, size, small, True)
        _link(before, block, after)
        insort(self._free[small], (size, start, block))
        return block

    def _out_of_pool(self, block: Held) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]


def _link(before: Held | None, block: Held, after: Held | None) -> None:
    block.before, block.after = before, after
    if before is not None:
        before.after = block
    if after is not None:
        after.before = block


def _could_grow_to(block: Held) -> int:
    after = block.after
    return block.size + (after.size if isinstance(after, _Unmapped) else 0)


def _to_map(first: Held, size: int) -> list[tuple[_Unmapped, int]]:
    """What of which regions is to be mapped for ``size`` bytes from ``first`` on."""
    page = PAGES[first.small]
    found: list[tuple[_Unmapped, int]] = []
    block: Held | None = first
    while size > 0:
        assert block is not None
        if isinstance(block, _Unmapped):
            found.append((block, min(block.size, -(-size // page) * page)))
        size -= block.size
        block = block.after
    return found


def _whole_pages(block: Held) -> tuple[int, int]:
    """Where the first page lies that is wholly within a block, and the bytes of all of them."""
    page, base = PAGES[block.small], _RANGES[block.small]
    start = -((base - block.address) // page) * page + base
    end = (block.address + block.size - base) // page * page + base
    return start, max(0, end - start)
