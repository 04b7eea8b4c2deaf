"""What the layers of a model take in a pass, as the installed transformers runs it.

The model is built on the meta device, cut to the layers that are of different kinds, and run twice
in each situation (prompt, decode step, probe; one sequence or several of unequal lengths; within
or beyond a sliding window). Nothing is known here about any family: eager attention, experts, fused
projections, latent attention and masks come as the installed version runs them. Only Llama's layers
are not recorded: their formulas are written out in ``planning.forward``, and a recording agrees.
torch and transformers are imported inside the functions. May import records and siblings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ..records.passes import Pass, Passes, Phase, Size
from .formulas import Parts, UnclearError, formula
from .kv import LayerKv
from .meta import decoder_layers
from .situations import Ran, run_pass

AS_LLAMA = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""With SDPA attention and without a sliding window."""
LONGEST = 1024
"""Tokens that a recording has at most, unless a window is longer."""
BATCHES = (11, 13)
_PHASES: tuple[Phase, ...] = ("prefill", "decode", "probe")

_last: tuple[object, Passes] | None = None


def passes_of(
    key: str,
    build: Callable[[], Any],
    *,
    quantised: Collection[str],
    caches: Sequence[LayerKv],
    max_context: int | None,
) -> tuple[Passes | None, tuple[str, ...]]:
    """The passes, and what cannot be told of them, a sentence each.

    The last ones are kept, since three tiers share them.

    :param key: what the model that ``build`` makes depends on.
    :param build: makes the model on the meta device in 16 bit, ours to change.
    :param quantised: names of the Linears in the layers whose weight 8 and 4 bit quantise.
    :param caches: of each decoder layer.
    """
    global _last  # noqa: PLW0603 - a cache of one
    whole = (key, frozenset(quantised), tuple(caches), max_context)
    if _last is not None and _last[0] == whole:
        return _last[1], ()
    try:
        found = _record_all(
            build().eval(), quantised=quantised, caches=caches, max_context=max_context
        )
    except Exception as error:  # any operation that needs data, which the meta device has not
        return None, (
            "what its layers take in a pass could not be recorded on the meta device "
            f"({type(error).__name__}); activations are counted as Llama's of the same sizes",
        )
    _last = (whole, found)
    return found, ()


def quantised_in_layers(model: Any) -> list[str]:
    """Names of the Linears in the layers whose weight 8 and 4 bit quantise; in 16 bit of those that
    they would."""
    layers = {id(layer) for layer in decoder_layers(model)}
    inside = tuple(f"{name}." for name, module in model.named_modules() if id(module) in layers)
    classes = {type(module).__name__ for module in model.modules()}
    replaced = {"Linear4bit", "Linear8bitLt"}
    wanted = replaced if classes & replaced else {"Linear", "Conv1D"}
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in wanted and name.startswith(inside)
    ]


def repeats_kv_to_decode() -> bool:
    """Whether the installed SDPA attention repeats K and V at one new token if there is a mask:
    newer versions pack the query's heads instead."""
    from transformers.integrations import sdpa_attention

    return not hasattr(sdpa_attention, "pack_gqa")


def _record_all(
    model: Any,
    *,
    quantised: Collection[str],
    caches: Sequence[LayerKv],
    max_context: int | None,
) -> Passes:
    kinds = _kinds(decoder_layers(model), caches)
    first = [kinds.index(kind) for kind in range(max(kinds) + 1)]
    # One more, so that each kind's layer has a successor.
    _cut(model, min(len(kinds), max(first) + 2))
    names = set(quantised)
    weights = {
        id(module.weight): name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name in names
    }
    longest = max_context or 1 << 20
    reached = sorted({c.window for c in caches if c.window is not None and c.window < longest})
    lengths = {False: _two_primes(2, min([LONGEST, longest, *(w - 1 for w in reached)]))}
    if reached:
        lengths[True] = _two_primes(reached[-1], 2 * reached[-1] + 8)
    deep: set[str] = set()
    bare: set[str] = set()

    def run(phase: Phase, batched: bool, batch: int, tokens: int) -> Ran:
        ran = run_pass(model, weights, phase, batch=batch, tokens=tokens, padded=batched)
        deep.update(weights[weight] for weight, _, dimensions in ran.fed if dimensions > 3)
        streams = {tensor for tensor in ran.hidden[:-1] if tensor}  # 0 is none that was recorded
        bare.update(weights[weight] for weight, tensor, _ in ran.fed if tensor in streams)
        return ran

    recorded = [
        _record(run, first, phase, batched=batched, beyond=beyond, lengths=pair)
        for beyond, pair in lengths.items()
        for batched in (False, True)
        for phase in _PHASES
    ]
    for one in recorded:
        for layer, index in zip(one.layers, first, strict=True):
            kept = any(step.op == "cache" for step in layer.steps)
            if kept != (one.phase != "probe" and caches[index].bytes_per_token > 0):
                raise UnclearError("a layer keeps its cache in another way than the rest")
    return Passes(
        kinds=tuple(kinds),
        window=min(reached, default=None),
        recorded=tuple(recorded),
        deep_inputs=tuple(sorted(deep)),
        bare_inputs=tuple(sorted(bare)),
    )


def _two_primes(above: int, most: int) -> tuple[int, int]:
    """Primes above the one and up to the other, not close to each other: what is rounded up to
    blocks must not look as if it grew with every token.

    :raises UnclearError: there are no two.
    """
    large = _prime_up_to(most)
    small = _prime_up_to(large * 3 // 5)
    small = small if small > above else _prime_up_to(large - 1)
    if small <= above:
        raise UnclearError(f"no two prime numbers of tokens between {above} and {most}")
    return small, large


def _prime_up_to(most: int) -> int:
    prime = (n for n in range(most, 1, -1) if all(n % d for d in range(2, int(n**0.5) + 1)))
    return next(prime, 0)


def _kinds(layers: Sequence[Any], caches: Sequence[LayerKv]) -> list[int]:
    """Layers of the same modules, shapes, settings and caches are of one kind."""
    known: dict[object, int] = {}
    return [
        known.setdefault((_signature(layer), cached), len(known))
        for layer, cached in zip(layers, caches, strict=True)
    ]


def _signature(layer: Any) -> object:
    settings = (bool, int, str, type(None))
    found = [
        (
            name,
            type(module).__name__,
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, settings) and not _NUMBERING.search(key)
            ),
        )
        for name, module in layer.named_modules()
    ]
    return tuple(found), tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())


_NUMBERING = re.compile("idx|index|layer_id|layer_num")


def _cut(model: Any, count: int) -> None:
    import torch

    layers = decoder_layers(model)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and list(module) == layers:
            del module[count:]
            return


def _record(
    run: Callable[[Phase, bool, int, int], Ran],
    first: Sequence[int],
    phase: Phase,
    *,
    batched: bool,
    beyond: bool,
    lengths: tuple[int, int],
) -> Pass:
    """One situation, recorded twice and put together."""
    batches = BATCHES if batched else (1, 1)
    one, other = (
        run(phase, batched, batch, tokens) for batch, tokens in zip(batches, lengths, strict=True)
    )

    def sized(a: int, b: int) -> Size:
        return formula((a, b), batches, lengths)

    if [e._replace(number=0) for e in one.events] != [e._replace(number=0) for e in other.events]:
        raise UnclearError("the order of allocations depends on the number of tokens")
    sizes = [sized(a.number, b.number) for a, b in zip(one.events, other.events, strict=True)]
    parts = Parts(one.events, sizes, one.hidden)
    layers = len(one.hidden) - 1
    if not parts.taken_in(one.hidden[0], 0):
        raise UnclearError("the first layer gets nothing that was made for it")
    return Pass(
        phase=phase,
        batched=batched,
        beyond=beyond,
        before=parts.steps(0),
        hidden=one.hidden[0],
        hidden_is_kept=parts.dropped.get(one.hidden[0], 2 * layers) > 2,
        layers=tuple(
            parts.layer(
                index,
                output=one.hidden[index + 1],
                last=index == layers - 1,
                inputs=tuple(map(sized, one.inputs[index], other.inputs[index])),
            )
            for index in first
        ),
        norm=parts.steps(2 * layers),
        head=parts.steps(2 * layers + 1),
        logits=sized(one.logits_bytes, other.logits_bytes),
    )
