"""Synthesised norms at half their size, and at twice theirs the matrices that read them.

LLM.int8 multiplies a column of a Linear's input in 16 bit where one of its values reaches 6.0. What
a norm gives spreads by 1, and of the 100 million values of a long prefill one or two get there. In
which layers, if any, hung on the text, and on that hung how torch's free blocks lay afterwards: 8 x
8,192 tokens on four H200s took 3.5 GiB more on the first GPU in one run of two. Halved, none gets
there. Factors of two change nothing else: in bfloat16 and in nf4 the model computes the same bits,
in float16 all but those of inputs below 0.0001.

Imports the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_NORMS = frozenset({"input_layernorm", "post_attention_layernorm"})
_READERS = frozenset(
    {
        *(f"self_attn.{name}_proj" for name in "qkv"),
        *(f"mlp.{name}_proj" for name in ("gate", "up")),
    }
)
_REST = frozenset({"self_attn.o_proj", "mlp.down_proj"})
_MAYBE = frozenset({"self_attn.q_norm", "self_attn.k_norm"})
_INSIDE = re.compile(r"(?P<block>(?:.+\.)?layers\.\d+)\.(?P<module>.+)\.(?:weight|bias)")


def factors(names: Iterable[str], zeros: Collection[str] = ()) -> dict[str, float]:
    """Weight to what it is multiplied by, in blocks that are built as Llama's; elsewhere none, as
    what reads a norm has other names there.

    :param names: of all parameters.
    :param zeros: those that are 0: a norm that adds one to its weight can't be halved so.
    """
    blocks: dict[str, set[str]] = {}
    for name in names:
        if found := _INSIDE.fullmatch(name):
            blocks.setdefault(found["block"], set()).add(found["module"])
    made: dict[str, float] = {}
    for block, modules in blocks.items():
        norms = [f"{block}.{norm}.weight" for norm in _NORMS]
        if modules - _MAYBE == _NORMS | _READERS | _REST and not any(n in zeros for n in norms):
            made |= dict.fromkeys(norms, 0.5)
            made |= {f"{block}.{reader}.weight": 2.0 for reader in _READERS}
    return made
