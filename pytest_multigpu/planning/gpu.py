"""One GPU while a forward is replayed on it: its allocator, its KV cache, attention's masks.

Imports records and its own part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..records.plan import Block
from .allocator import Allocator, Elsewhere, Held
from .costs import Costs


@dataclass(kw_only=True)
class Gpu:
    """Bytes of KV are counted in ``allocator.kv``."""

    allocator: Allocator
    costs: Costs
    cache: dict[str, tuple[list[Held], int]] = field(default_factory=dict)
    """Layer name to its K and V, and the bytes of each."""

    @property
    def elsewhere(self) -> bool:
        """Not replayed: its layers are passed over."""
        return isinstance(self.allocator, Elsewhere)

    def extend_cache(self, block: Block, new: int, batch: int, total: int) -> None:
        """``DynamicLayer.update``: new K by ``torch.cat``, old K released, then the same for V.

        ``DynamicSlidingWindowLayer`` joins the ``window - 1`` tokens that it keeps and the new
        ones, both K and V before it releases either; what it keeps of that is a view, so a
        prompt's whole K and V live until the next step.
        """
        a, window = self.allocator, block.kv_window
        tokens = total if window is None else min(total, window - 1 + new)
        half = max(1, block.kv_bytes_per_token * tokens * batch // 2)
        old = self.cache.get(block.name)
        joined: list[Held] = []
        for _ in range(2):
            a.kv += half
            joined.append(a.take(half))
            if old is not None and window is None:
                self._release(old[0][len(joined) - 1], old[1])
        if old is not None and window is not None:
            for held in old[0]:
                self._release(held, old[1])
        self.cache[block.name] = (joined, half)

    def _release(self, held: Held, size: int) -> None:
        self.allocator.drop(held)
        self.allocator.kv -= size

    def mask_for_kernel(self, pairs: int, total: int, size: int) -> list[Held]:
        """What an attention kernel makes of a boolean mask of that many queries and keys.

        :param total: keys.
        :param size: bytes of a number in the model's dtype.
        """
        held = [self.allocator.take(pairs * size) for _ in range(self.costs.mask_copy)]
        return [*held, *self.mask_aligned(pairs, total, size)]

    def mask_aligned(self, pairs: int, total: int, size: int) -> list[Held]:
        """Further copies of an additive mask, where the kernel needs aligned rows."""
        aligned = -(-total // 8) * 8
        if aligned == total:
            return []
        bytes_each = pairs // total * aligned * size
        return [self.allocator.take(bytes_each) for _ in range(self.costs.mask_copy_unaligned)]
