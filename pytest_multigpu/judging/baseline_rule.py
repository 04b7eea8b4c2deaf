"""``--gpu-baseline-rule`` as tolerances. Pure: records, units and errors only."""

from __future__ import annotations

import re

from ..errors import UsageError
from ..records.baseline import DEFAULT_RULE, KINDS, Kind, Tolerance
from ..units import parse_size

_NUMBER = re.compile(r"\d{1,9}(?:\.\d{1,9})?", re.ASCII)
_OPTION = "--gpu-baseline-rule"


def parse_rule(text: str | None) -> dict[Kind, Tolerance]:
    """``peak:2%+256MiB speed:10% load:20%`` as tolerances; a kind left out is not compared.

    A percentage is of the recorded value; after ``+``, or alone, an amount: a size for ``peak``,
    seconds (``5s``) for ``load``, a number for ``speed`` (tokens/s) and ``score`` (standard
    deviations of the text set's scores, since a probe's unit is its own).

    :param text: None is :data:`DEFAULT_RULE`.
    :raises UsageError: naming the part that cannot be read.
    """
    rule: dict[Kind, Tolerance] = {}
    terms = (DEFAULT_RULE if text is None else text).split()
    if not terms:
        raise UsageError(f"{_OPTION}: is empty; write it like peak:2%+256MiB speed:10%")
    for term in terms:
        name, colon, amounts = term.partition(":")
        kind = next((known for known in KINDS if known == name), None)
        if kind is None:
            raise UsageError(f"{_OPTION}: {term!r} is of no known kind; known: {', '.join(KINDS)}")
        if not colon or not amounts:
            raise UsageError(f"{_OPTION}: {term!r} has no tolerance; write it like {kind}:10%")
        if kind in rule:
            raise UsageError(f"{_OPTION}: {kind} is named twice; name it once")
        rule[kind] = _tolerance(kind, amounts, term)
    return rule


def _tolerance(kind: Kind, amounts: str, term: str) -> Tolerance:
    fraction: float | None = None
    absolute: float | None = None
    for part in amounts.split("+"):
        percent = part.endswith("%")
        if (fraction if percent else absolute) is not None:
            what = "percentages" if percent else "amounts"
            raise UsageError(f"{_OPTION}: {term!r} has two {what}; write one")
        if percent:
            if _NUMBER.fullmatch(part[:-1]) is None:
                raise UsageError(f"{_OPTION}: {term!r}: {part!r} is not a percentage like 10%")
            fraction = float(part[:-1]) / 100
        else:
            absolute = _amount(kind, part, term)
    if kind == "speed" and (fraction or 0) >= 1:
        raise UsageError(f"{_OPTION}: {term!r} could never fail; write less than 100%")
    return Tolerance(fraction or 0.0, absolute or 0.0)


def _amount(kind: Kind, part: str, term: str) -> float:
    if kind == "peak":
        return parse_size(part, what=f"{_OPTION}: {term}")
    digits = part.removesuffix("s") if kind == "load" else part
    if _NUMBER.fullmatch(digits) is None or (kind == "load" and digits == part):
        example = {"load": "seconds like 5s", "speed": "tokens/s like 2"}.get(kind, "a number")
        raise UsageError(f"{_OPTION}: {term!r}: {part!r} is not a percentage or {example}")
    return float(digits)
