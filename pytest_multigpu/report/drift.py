"""``drift.json`` in the folder of ``--gpu-report``: scores of the text set, over runs.

Scores are added and never changed: a set-up's first READY run is what later ones are held against.
The table of drifts beside them is for people, and is made anew at each write.
Imports records, errors, the pure rule of :mod:`pytest_multigpu.judging.drift` and the statistics
of :mod:`pytest_multigpu.probes.drift`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import UsageError, shown
from ..files import read_text
from ..judging.drift import advice, closest, rank
from ..probes.drift import drift_between
from ..probes.textset import TEXTS, text_set
from ..records.drift import LARGEST, TextScores
from ..records.tiers import TIERS
from .atomic import locked, write_json

DRIFT_FILE = "drift.json"
SCHEMA = 1
_TEXT = ("model", "weights", "probe", "texts", "tokens", "tier", "dtype")
_REMEDY = "repair it, move it away, or name another --gpu-report folder"


def read_drift(path: Path) -> tuple[TextScores, ...]:
    """Every set of scores in the file, in order; none if there is no file yet.

    :raises UsageError: unreadable or damaged; names the file, what is wrong and the remedy.
    """
    try:
        data = json.loads(read_text(path))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8; {_REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(data, dict) or not isinstance(data.get("scores"), list):
        raise UsageError(f"{path}: has no list of scores; {_REMEDY}")
    if data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        schema = shown(data.get("schema"))
        raise UsageError(f"{path}: schema is {schema}, known is {SCHEMA}; {_REMEDY}")
    found = tuple(_scores(row, f"{path}: scores {i}") for i, row in enumerate(data["scores"], 1))
    lengths = {text_set(): len(TEXTS)}
    for i, one in enumerate(found, 1):
        texts = lengths.setdefault(one.texts, len(one.values))
        if len(one.values) != texts:
            text = f"{len(one.values)} scores for {texts} texts"
            raise UsageError(f"{path}: scores {i}: values: {text}; {_REMEDY}")
    return found


def _scores(row: Any, where: str) -> TextScores:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: is not an object; {_REMEDY}")
    for key in _TEXT:
        if not isinstance(row.get(key), str):
            raise UsageError(f"{where}: {key}: {shown(row.get(key))} is not text; {_REMEDY}")
    if row["tier"] not in TIERS or not row["dtype"].isidentifier():
        text = f"{shown(row['tier'])} and {shown(row['dtype'])}"
        raise UsageError(f"{where}: tier and dtype: {text} are not known; {_REMEDY}")
    gpus, versions, values = row.get("gpus"), row.get("versions"), row.get("values")
    if not isinstance(gpus, list) or not all(isinstance(name, str) for name in gpus):
        raise UsageError(f"{where}: gpus: is not a list of names; {_REMEDY}")
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise UsageError(f"{where}: versions: is not package to version; {_REMEDY}")
    if not isinstance(values, list) or not all(map(_is_number, [*values, row.get("when")])):
        raise UsageError(f"{where}: when and values must be numbers; {_REMEDY}")
    scores = TextScores(
        **{key: row[key] for key in _TEXT},
        gpus=tuple(gpus),
        versions=versions,
        when=float(row["when"]),
        values=tuple(map(float, values)),
    )
    if len(values) < 3 or not scores.differ:
        raise UsageError(f"{where}: values: needs three scores or more that differ; {_REMEDY}")
    return scores


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < LARGEST  # so NaN is none


def keep_scores(path: Path, scores: TextScores) -> None:
    """Add scores to the file, unless their set-up has some already; nothing in it is changed.

    :raises UsageError: damaged or unwritable file.
    """
    try:
        with locked(path.parent):
            known = read_drift(path)
            if all(one.setup != scores.setup for one in known):
                write_json(path, to_json([*known, scores]))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); {_REMEDY}") from error


def to_json(known: Sequence[TextScores]) -> dict[str, Any]:
    """What the file holds."""
    return {
        "schema": SCHEMA,
        "scores": [scores_row(one) for one in known],
        "drift": drift_rows(known),
    }


def scores_row(scores: TextScores) -> dict[str, Any]:
    """One set of scores as plain data."""
    row = {item.name: getattr(scores, item.name) for item in fields(scores)}
    row.update(gpus=list(scores.gpus), versions=dict(scores.versions), values=list(scores.values))
    return row


def drift_rows(known: Sequence[TextScores]) -> list[dict[str, Any]]:
    """For each subject, every precision beside the best one that was scored, latest scores."""
    rows = []
    for subject in dict.fromkeys(one.subject for one in known):
        latest = max((one for one in known if one.subject == subject), key=lambda one: one.when)
        best, *others = sorted(closest(latest, known), key=rank, reverse=True)
        for other in others:
            reading = drift_between(best.values, other.values)
            said = advice(best.precision, other.precision, reading)
            rows.append(
                {
                    "model": best.model,
                    "probe": best.probe,
                    "base": best.precision,
                    "tier": other.precision,
                    **asdict(reading),
                    "advice": said or f"the threshold of {best.precision} holds",
                }
            )
    return rows
