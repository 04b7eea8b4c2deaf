"""Byte-verified copies: host to GPU, every ordered pair, chains through all GPUs.

Random bytes are made once on the host and uploaded to every GPU. What GPU ``s`` sends is those
bytes XOR its own key; the receiver computes the same from its own upload, so the reference never
travels between GPUs. Destinations hold a known pattern first: what was not written shows as stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import TYPE_CHECKING, TypedDict

from .again import best_speeds
from .emitter import Emitter, GpuError

if TYPE_CHECKING:
    import torch

    from .backend import Backend

SEED = 20_896
POISON_BYTE = 0xA5
_POISON = int.from_bytes(bytes([POISON_BYTE]) * 8, "little", signed=True)
BUFFERS = 10
"""Buffers of ``copy_bytes`` that a GPU holds at most at any time during these steps."""


class Comparison(TypedDict):
    differing_bytes: int
    first_offset: int | None
    kind: str


@dataclass(frozen=True)
class Pattern:
    """The random bytes on the host, as int64, and what they must sum to on every GPU."""

    words: torch.Tensor
    checksum: int


def key_of(gpu: int) -> int:
    """A 63-bit constant of its own for each GPU (odd multiples of the golden ratio)."""
    return (0x9E3779B97F4A7C15 * (2 * gpu + 1)) & 0x7FFFFFFFFFFFFFFF


def checksum(words: torch.Tensor) -> int:
    """Sum of ``word * (2 * position + 1)`` modulo 2**64: sees changed, lost and moved words."""
    import torch

    flat = words.reshape(-1)
    weights = torch.arange(1, 2 * flat.numel(), 2, device=flat.device, dtype=torch.int64)
    return int((flat.to(torch.int64) * weights).sum())


def make_pattern(copy_bytes: int) -> Pattern:
    """``copy_bytes`` seeded random bytes; a multiple of 8."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    words = torch.empty(copy_bytes // 8, dtype=torch.int64)
    # Without bounds, random_ fills int64 with 63 bits; the keys' XOR and the offsets do not mind.
    words.random_(generator=generator)
    return Pattern(words=words, checksum=checksum(words))


def compare(received: torch.Tensor, expected: torch.Tensor) -> Comparison:
    """Both int64 of one shape on the receiving device."""
    import torch

    if torch.equal(received, expected):
        return {"differing_bytes": 0, "first_offset": None, "kind": ""}
    got = received.reshape(-1).view(torch.uint8)
    wrong = got != expected.reshape(-1).view(torch.uint8)
    differing = int(wrong.sum())
    if not differing:
        raise RuntimeError("words differ and bytes do not: the comparison itself went wrong")
    # Masks, not got[wrong]: that would take eight bytes of index for each differing byte.
    if not bool((wrong & (got != 0)).any()):
        kind = "all zero"
    elif not bool((wrong & (got != POISON_BYTE)).any()):
        kind = "stale"
    else:
        kind = "mixed"
    first = int(wrong.to(torch.uint8).argmax())
    return {"differing_bytes": differing, "first_offset": first, "kind": kind}


def chain_orders(gpus: Sequence[int]) -> list[tuple[int, ...]]:
    """Orders through all GPUs and back to the first: forward, reversed, strided, rotated.

    ``[0, 1, 2]`` gives 0-1-2-0, 2-1-0-2, 0-2-1-0, 1-2-0-1: a model's own way, and others.
    """
    if len(gpus) < 2:
        return []
    line = list(gpus)
    middle = len(line) // 2
    lines = [line, line[::-1], line[::2] + line[1::2], line[middle:] + line[:middle]]
    orders: list[tuple[int, ...]] = []
    for visited in lines:
        order = (*visited, visited[0])
        if order not in orders:
            orders.append(order)
    return orders


class CopyTest:
    """The copies of one worker: ``upload``, then ``pairs`` and ``chains`` in any order."""

    def __init__(
        self, backend: Backend, emitter: Emitter, pattern: Pattern, gpus: Sequence[int]
    ) -> None:
        """:param gpus: those to test."""
        self._gpus = tuple(gpus)
        self._backend = backend
        self._emitter = emitter
        self._pattern = pattern
        self.bytes = pattern.words.numel() * 8
        self.uploaded: dict[int, torch.Tensor] = {}
        self._sent: dict[int, torch.Tensor] = {}
        self._target: dict[int, torch.Tensor] = {}

    def upload(self, pinned: torch.Tensor) -> None:
        """The pattern to every GPU, checked there; then what each will send.

        :param pinned: uint8 on the host, of the pattern's length.
        """
        import torch

        host = pinned.view(torch.int64)
        host.copy_(self._pattern.words)

        def prepare(gpu: int) -> bool:
            words = torch.empty(host.numel(), dtype=torch.int64, device=self._backend.device(gpu))
            self._backend.upload(words, host, gpu)
            self.uploaded[gpu] = words
            self._sent[gpu] = words ^ key_of(gpu)
            self._target[gpu] = torch.full_like(words, _POISON)
            return checksum(words) == self._pattern.checksum

        for gpu, equal in zip(self._gpus, self._emitter.each(self._gpus, prepare), strict=True):
            self._emitter.result("upload", gpu=gpu, bytes=self.bytes, equal=equal)

    def pairs(self) -> None:
        """Every ordered pair, one way, compared on the receiving GPU."""
        for source, target in permutations(self._gpus, 2):
            self._emitter.at(source, target, path=True)
            try:
                found = self._pair(source, target)
            except Exception as error:
                raise GpuError([source, target], error) from error
            self._emitter.result("pair", source=source, target=target, bytes=self.bytes, **found)

    def _pair(self, source: int, target: int) -> Comparison:
        out = self._target[target]
        out.fill_(_POISON)
        # The poison must have landed: it has to be what lay there before, not a racing write.
        self._backend.synchronize(target)
        self._backend.copy_into(out, self._sent[source], (source, target))
        return compare(out, self.uploaded[target] ^ key_of(source))

    def chains(self) -> None:
        """All orders, as copies alone and with each copy right behind a kernel."""
        for after_kernel in (False, True):
            for order in chain_orders(self._gpus):
                self._emitter.at(*order, path=True)
                try:
                    found, wrong_hop = self._chain(order, after_kernel)
                except Exception as error:
                    raise GpuError(order, error) from error
                self._emitter.result(
                    "chain",
                    order=list(order),
                    bytes=self.bytes,
                    after_kernel=after_kernel,
                    wrong_hop=wrong_hop,
                    **found,
                )

    def _chain(
        self, order: Sequence[int], after_kernel: bool
    ) -> tuple[Comparison, tuple[int, int] | None]:
        self._poison_free_blocks(order)
        tensor = self._sent[order[0]]
        arrived: list[torch.Tensor] = []
        # No synchronisation from here to the last hop: that is what a model's layers do.
        for hop, pair in enumerate(pairwise(order)):
            if after_kernel:
                tensor = tensor * 3 + hop
            tensor = self._backend.send(tensor, pair, hop=hop)
            arrived.append(tensor)
        found = compare(arrived[-1], self._expected(order, len(arrived), after_kernel))
        if not found["differing_bytes"]:
            return found, None
        for hop, words in enumerate(arrived):
            at_hop = compare(words, self._expected(order[: hop + 2], hop + 1, after_kernel))
            if at_hop["differing_bytes"]:
                # What arrived there tells zero from stale; later kernels hide it.
                found["kind"] = at_hop["kind"]
                return found, (order[hop], order[hop + 1])
        return found, None

    def _expected(self, order: Sequence[int], hops: int, after_kernel: bool) -> torch.Tensor:
        """What must lie on the last GPU of ``order``, from that GPU's own upload."""
        words = self.uploaded[order[-1]] ^ key_of(order[0])
        if after_kernel:
            for hop in range(hops):
                words = words * 3 + hop
        return words

    def _poison_free_blocks(self, order: Sequence[int]) -> None:
        """Fill and free what ``.to()`` will be given by the allocator, twice a GPU."""
        import torch

        for gpu in set(order):
            held = [torch.full_like(self.uploaded[gpu], _POISON) for _ in range(2)]
            del held
            self._backend.synchronize(gpu)

    def host_speeds(self, pinned: torch.Tensor) -> None:
        """Pinned host memory to each GPU, one after another: they may share a PCIe switch."""
        import torch

        host = pinned.view(torch.int64)

        def speed(gpu: int) -> float:
            def work() -> None:
                self._backend.upload(self.uploaded[gpu], host, gpu)

            self._emitter.at(gpu)
            try:
                seconds = min(self._backend.seconds_of(gpu, work) for _ in range(3))
            except Exception as error:
                raise GpuError([gpu], error) from error
            return self.bytes / seconds / 1e9

        best_speeds(
            self._gpus,
            lambda gpus: [speed(gpu) for gpu in gpus],
            lambda gpu, found: self._emitter.result("host speed", gpu=gpu, gb_per_s=found),
            share=_LINKS_AGAIN,
        )

    def pair_speeds(self) -> None:
        """GB/s of every ordered pair, one after another, warm: run after ``pairs``."""

        def tell(pair: tuple[int, int], found: float) -> None:
            self._emitter.result("pair speed", source=pair[0], target=pair[1], gb_per_s=found)

        best_speeds(
            list(permutations(self._gpus, 2)),
            lambda pairs: [self._bandwidth(*pair) for pair in pairs],
            tell,
            share=_LINKS_AGAIN,
        )

    def _bandwidth(self, source: int, target: int) -> float:
        self._emitter.at(source, target, path=True)
        try:
            return self._copied(source, target)
        except Exception as error:
            raise GpuError([source, target], error) from error

    def _copied(self, source: int, target: int) -> float:
        def copies(count: int) -> float:
            def work() -> None:
                for _ in range(count):
                    self._backend.copy_into(
                        self._target[target], self._sent[source], (source, target)
                    )

            # The copies run on the source's stream.
            return count * self.bytes / self._backend.seconds_of(source, work) / 1e9

        first = copies(1)
        # A slow way needs no long run, and would take too much of the seconds we have.
        return max(first, copies(4)) if first > _FAST_GB_PER_S else max(first, copies(1))


_FAST_GB_PER_S = 40.0
_LINKS_AGAIN = 0.7
"""Of the fastest: what is below is measured again before anybody judges it."""
