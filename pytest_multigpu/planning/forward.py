"""Llama's forward pass as a sequence of allocations, replayed on simulated allocators.

The order of allocations and releases is that of ``LlamaDecoderLayer`` in transformers 5.x with
SDPA attention and no gradient (``modeling_llama.py``, ``masking_utils.py``, ``cache_utils.py``);
what a Linear takes is :mod:`.linears`' matter. The layers of other models are recorded and replayed
by :mod:`.recorded`.

Several sequences are of unequal lengths, so a pass has a padding mask: made once on the first GPU,
``(batch, 1, tokens, total)`` with a byte each, and copied onto every other GPU for each of its
layers. With a mask K and V are repeated for all query heads first (``use_gqa_in_sdpa``), and the
attention kernel makes an additive mask of its own: see :class:`.costs.Costs`.

``t`` is tokens x sequences in one pass. Imports records and its own part.
"""

from __future__ import annotations

from ..records.plan import Architecture, Block
from ..records.probe import default_layer
from .allocator import Allocator, Held
from .costs import Costs
from .gpu import Gpu as Gpu
from .linears import DTYPE_BYTES, Linears

Shape = tuple[int, int]


class Forward:
    """Replays passes of one model. Blocks arrive in forward order with their GPU."""

    def __init__(self, architecture: Architecture, *, logits_rows: int) -> None:
        """:param logits_rows: positions whose logits a pass makes: 1 a sequence in ``generate``."""
        self.size = DTYPE_BYTES[architecture.dtype]
        self.tier = architecture.tier
        self.linears = Linears(architecture)
        self.hidden = architecture.hidden_size
        self.query = architecture.heads * architecture.head_dim
        self.kv = architecture.kv_heads * architecture.head_dim
        self.intermediate = architecture.intermediate_size
        self.vocab = architecture.vocab_size
        self.head_dim = architecture.head_dim
        self.repeats_to_decode = architecture.repeats_kv_to_decode
        self.logits_rows = logits_rows
        self.probed = default_layer(architecture.layers) - 1
        """The layer whose output a probe reads."""

    def run(
        self,
        blocks: list[tuple[Block, Gpu]],
        *,
        tokens: int,
        batch: int,
        total_tokens: int,
        probe: bool = False,
    ) -> None:
        """One pass of ``tokens`` new tokens for each of ``batch`` sequences.

        :param total_tokens: tokens in the cache afterwards.
        :param probe: without cache and head; the output of the layer that a probe reads is kept,
            as its hook does, and scored in fp32.
        """
        t = tokens * batch
        first = blocks[0][1]
        embedded = first.allocator.take(t * self.hidden * self.size)
        pairs = t * total_tokens if batch > 1 else 0
        shared = [self._mask(first, pairs, batch)] if pairs else []
        shared += self._angles(first.allocator, t)
        x, x_gpu = embedded, first
        kept: Held | None = None
        kept_gpu = first
        for block, gpu in blocks:
            if block.kind == "layer":
                a = gpu.allocator
                moved = x
                extra: list[Held] = []
                if gpu is not x_gpu:
                    moved = a.take(t * self.hidden * self.size)
                if gpu is not first:
                    extra = [a.take(pairs)] if pairs else []
                    extra += [a.take(t * self.head_dim * self.size) for _ in range(2)]
                y = self._layer(
                    gpu,
                    block,
                    moved,
                    t,
                    batch=batch,
                    total_tokens=total_tokens,
                    keep_cache=not probe,
                )
                for held in extra:
                    a.drop(held)
                if moved is not x:
                    a.drop(moved)
                if x is not embedded and x is not kept:
                    x_gpu.allocator.drop(x)
                x, x_gpu = y, gpu
                if probe and block.layer == self.probed:
                    kept, kept_gpu = y, gpu
        norm = next((gpu for block, gpu in blocks if block.kind == "norm"), x_gpu)
        head = next((gpu for block, gpu in blocks if block.kind == "head"), norm)
        moved = x if norm is x_gpu else norm.allocator.take(t * self.hidden * self.size)
        normed = self._norm(norm.allocator, t)
        if moved is not x:
            norm.allocator.drop(moved)
        if x is not embedded and x is not kept:
            x_gpu.allocator.drop(x)
        for held in shared:
            first.allocator.drop(held)
        first.allocator.drop(embedded)
        if not probe:
            self._logits(head, first, batch)
        norm.allocator.drop(normed)
        if kept is not None:
            upcast = kept_gpu.allocator.take(t * self.hidden * 4)
            kept_gpu.allocator.drop(upcast)
            kept_gpu.allocator.drop(kept)

    def extend(self, blocks: list[tuple[Block, Gpu]], *, batch: int, total_tokens: int) -> None:
        """A decode step, caches only: what else it holds is small and there since the first.

        Dequantised nf4 weights and repeated K and V are the exceptions, and are replayed.
        """
        for block, gpu in blocks:
            if block.kind != "layer" or gpu.elsewhere:
                continue
            before, after = self._dequantised(block, gpu.costs, batch)
            for size in before:
                gpu.allocator.drop(gpu.allocator.take(size))
            gpu.extend_cache(block, 1, batch, total_tokens)
            if batch > 1 and self.query > self.kv and self.repeats_to_decode:
                repeated = batch * total_tokens * self.query * self.size
                for held in [gpu.allocator.take(repeated) for _ in range(2)]:
                    gpu.allocator.drop(held)
            for size in after:
                gpu.allocator.drop(gpu.allocator.take(size))

    def _dequantised(self, block: Block, costs: Costs, batch: int) -> tuple[list[int], list[int]]:
        """Bytes of the nf4 weights that a decode step of the layer has in 16 bit for a moment, one
        after the other: before its cache grows, and after."""
        if self.tier != "4bit":
            return [], []
        before, after = (
            [
                rows * columns * self.size
                for rows, columns in shapes
                if costs.dequantises(batch, rows, columns)
            ]
            for shapes in self.layer_linears(block, batch)
        )
        return before, after

    def layer_linears(self, block: Block, batch: int) -> tuple[list[Shape], list[Shape]]:
        """``(rows, columns)`` of a layer's Linears, in order: before its cache grows, and after."""
        del block, batch  # all alike
        hidden, wide = self.hidden, self.intermediate
        return (
            [(self.query, hidden), (self.kv, hidden), (self.kv, hidden)],
            [(hidden, self.query), (wide, hidden), (wide, hidden), (hidden, wide)],
        )

    def _logits(self, head: Gpu, first: Gpu, batch: int) -> None:
        """``lm_head``; the root hook moves them to the input's GPU; ``generate`` makes fp32."""
        size = self.logits_rows * batch * self.vocab * self.size
        head.allocator.logits += size
        logits = head.allocator.take(size)
        self._use_logits(head, first, size, batch)
        head.allocator.drop(logits)
        head.allocator.logits -= size

    def _use_logits(self, head: Gpu, first: Gpu, size: int, batch: int) -> None:
        """Moved to the first GPU; the last token's once more in fp32."""
        a, wide = first.allocator, batch * self.vocab * 4
        before = a.logits
        moved: list[Held] = []
        if head is not first:
            a.logits += size
            moved = [a.take(size)]
        a.logits += wide
        a.drop(a.take(wide))
        for held in moved:
            a.drop(held)
        a.logits = before

    def _angles(self, a: Allocator, t: int) -> list[Held]:
        """``LlamaRotaryEmbedding``: cosine and sine, made in fp32 of angles and their double."""
        wide = t * self.head_dim * 4
        made = [a.take(wide // 2), a.take(wide)]
        for _ in range(2):
            unscaled = a.take(wide)
            made.append(a.take(wide))
            a.drop(unscaled)
        narrow = [a.take(t * self.head_dim * self.size) for _ in range(2)]
        for held in made:
            a.drop(held)
        return narrow

    @staticmethod
    def _mask(gpu: Gpu, pairs: int, batch: int) -> Held:
        """``sdpa_mask``: the causal part, once more with what it is joined to, the padded one."""
        a = gpu.allocator
        causal = a.take(pairs // batch)
        joined = a.take(pairs // batch)
        a.drop(causal)
        mask = a.take(pairs)
        a.drop(joined)
        return mask

    def _layer(
        self,
        gpu: Gpu,
        block: Block,
        x: Held,
        t: int,
        *,
        batch: int,
        total_tokens: int,
        keep_cache: bool,
    ) -> Held:
        """``LlamaDecoderLayer.forward``; ``x`` stays with the caller, the output is returned.

        At the worst moment 16-bit Llama holds x, the residual, the normed input, and three
        tensors of the intermediate size (activated gate, up, product).
        """
        if gpu.elsewhere:
            return x
        del x  # held by the caller throughout
        a, size, linear = gpu.allocator, self.size, self.linears.run
        hidden, query, kv = t * self.hidden * size, t * self.query * size, t * self.kv * size
        normed = self._norm(a, t)
        share = gpu.costs.outliers_in(block.layer)
        q = linear(a, gpu.costs, t, self.query, self.hidden, outliers=share)
        k = linear(a, gpu.costs, t, self.kv, self.hidden, outliers=share)
        v = linear(a, gpu.costs, t, self.kv, self.hidden, outliers=share)
        q_rotated = self._rotate(a, query)
        k_rotated = self._rotate(a, kv)
        a.drop(q)
        a.drop(k)
        if keep_cache:
            gpu.extend_cache(block, t // batch, batch, total_tokens)
            a.drop(k_rotated)
            a.drop(v)
        beside: list[Held] = []
        if batch > 1:
            one = t == batch
            if self.query > self.kv and (not one or self.repeats_to_decode):
                repeated = batch * total_tokens * self.query * size
                beside = [a.take(repeated) for _ in range(2)]
            beside += gpu.mask_for_kernel(t * total_tokens, total_tokens, size)
        attended = a.take(query)
        if gpu.costs.attention_statistics:
            a.drop(a.take(max(4, t * self.query // self.head_dim * 4)))  # fp32 log-sum-exp
        for held in reversed(beside):
            a.drop(held)
        share = gpu.costs.int8_outliers_attended
        out = linear(a, gpu.costs, t, self.hidden, self.query, outliers=share)
        a.drop(attended)
        a.drop(q_rotated)  # the attention's frame holds it to its end
        if not keep_cache:
            a.drop(k_rotated)
            a.drop(v)
        a.drop(normed)
        residual = a.take(hidden)
        a.drop(out)
        normed = self._norm(a, t)
        mlp = self._mlp(gpu, block, t)
        a.drop(normed)
        result = a.take(hidden)
        a.drop(mlp)
        a.drop(residual)
        return result

    def _norm(self, a: Allocator, t: int) -> Held:
        """``LlamaRMSNorm``: an fp32 copy, its square, the fp32 result, two in the model's dtype."""
        wide, narrow = t * self.hidden * 4, t * self.hidden * self.size
        upcast = a.take(wide)
        squared = a.take(wide)
        variance = a.take(max(4, t * 4))
        a.drop(squared)
        scaled = a.take(wide)
        a.drop(upcast)
        cast = a.take(narrow)
        result = a.take(narrow)
        a.drop(cast)
        a.drop(scaled)
        a.drop(variance)
        return result

    @staticmethod
    def _rotate(a: Allocator, size: int) -> Held:
        """``apply_rotary_pos_emb``: x * cos + rotate_half(x) * sin."""
        straight = a.take(size)
        negated = a.take(size // 2)
        turned = a.take(size)
        a.drop(negated)
        product = a.take(size)
        a.drop(turned)
        result = a.take(size)
        a.drop(product)
        a.drop(straight)
        return result

    def _mlp(self, gpu: Gpu, block: Block, t: int) -> Held:
        """``down(act(gate(x)) * up(x))``."""
        a, wide, linear = gpu.allocator, t * self.intermediate * self.size, self.linears.run
        share = gpu.costs.outliers_in(block.layer)
        gate = linear(a, gpu.costs, t, self.intermediate, self.hidden, outliers=share)
        activated = a.take(wide)
        a.drop(gate)
        up = linear(a, gpu.costs, t, self.intermediate, self.hidden, outliers=share)
        product = a.take(wide)
        a.drop(up)
        a.drop(activated)
        share = gpu.costs.int8_outliers_down
        down = linear(a, gpu.costs, t, self.hidden, self.intermediate, outliers=share)
        a.drop(product)
        return down
