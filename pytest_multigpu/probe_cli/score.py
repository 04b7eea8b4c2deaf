"""``score``: transcripts in, a table of scores out, or one line that says why not.

What can be known from the config is checked before anything is loaded. Imports the session, judges,
the probes, records and errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoadError, ScoringError, UsageError
from ..judging.probe_fit import judge_fit, judge_size, unmeasured_size
from ..judging.verdict import sentence
from ..options import DEFAULT_CONTEXT, Settings
from ..probes.formats import load_probe
from ..probes.probe import Probe
from ..probes.spans import Chat, tokenize_chat
from ..probes.transcripts import Transcript, area_of, read_transcripts, table
from ..progress import line as loading
from ..records.check import Record
from ..records.probe import ProbeFit
from ..report.atomic import write_json
from ..requirements import Wanted
from ..session import GpuSession
from .convert import changed
from .line import Line

if TYPE_CHECKING:
    from ..model.loaded import LoadedModel
    from ..probes.scoring import Score
    from ..records.plan import Architecture

_SAMPLE_TOKENS = 512
"""A text of at most that many tokens tells the size of activations, at nine layers or more."""
_MEANINGLESS = "weights are synthesised: these scores try the machinery and mean nothing"


def score(options: argparse.Namespace) -> int:
    """:raises MultiGpuError: one line; nothing is scored by halves."""
    out = _writable(options)
    probe = changed(load_probe(options.probe), options)
    path = Path(options.transcripts)
    transcripts = read_transcripts(path)
    settings = _settings(options)
    book = GpuSession(settings, os.environ).plans
    if book.weights == "synthetic" and options.weights != "synthetic":
        raise UsageError(
            f"no checkpoint of {options.model!r} on this machine, and scores of synthesised "
            "weights mean nothing; give its folder as --model, or try the machinery with "
            "--weights synthetic"
        )
    architecture = book.architecture(options.tier)
    misfits = _misfits(judge_fit(_fit(probe, architecture)), options)
    chats = _prepared(book.resolved, architecture, probe, path, transcripts, options)
    longest = max(len(chat.input_ids) for chat in chats)
    session = GpuSession(
        dataclasses.replace(settings, context=options.context or longest), os.environ
    )
    line = Line()
    try:
        loaded = _load(session, line)
        size = _size(loaded, probe, chats)
        weights = loaded.load.weights
        believed = weights == "checkpoint"
        if believed:
            misfits += _misfits([size], options)
        scores = _score(loaded, probe, path, transcripts, chats, options.batch, line)
    finally:
        line.clear()
        session.close()
    if not believed:
        print(_MEANINGLESS)
    print("\n".join(table(probe, transcripts, scores, believed=believed)))
    print(f"weights: {weights}; probe: {probe.source}{_shown_size(size)}")
    if not believed:
        print(_MEANINGLESS)
    if out is not None:
        area = area_of(transcripts, scores) if believed else None
        content = {
            "probe": probe.source,
            "model": options.model,
            "weights": weights,
            "tier": options.tier,
            "dtype": options.dtype,
            "activation_size": size.measured,
            "misfits": misfits,
            "auroc": None if area is None else dataclasses.asdict(area),
            "scores": [
                {"id": t.name, "label": t.label, **dataclasses.asdict(s)}
                for t, s in zip(transcripts, scores, strict=True)
            ],
        }
        try:
            write_json(out, content)
        except OSError as error:
            raise UsageError(f"--out: {out}: cannot be written: {error.strerror}") from error
    return 0


def _writable(options: argparse.Namespace) -> Path | None:
    """Known before an hour of scoring."""
    if options.out is None:
        return None
    path = Path(options.out)
    probe = Path(options.probe)
    # os.path: it says no where pathlib raises, of a name that is too long.
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"--out: {options.out!r} is no file; give a file's name")
    # A folder may have no name ("."), and no file beside it.
    beside = (probe.with_suffix(".json"),) if os.path.isfile(probe) else ()
    for read in (probe, *beside, Path(options.transcripts)):
        if os.path.exists(path) and os.path.exists(read) and path.samefile(read):
            raise UsageError(f"--out: {options.out!r} is what is read; give another name")
    if not os.path.isdir(path.parent):
        raise UsageError(f"--out: there is no folder {str(path.parent)!r}; make it")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--out: the folder {str(path.parent)!r} can't be written to")
    return path


def _settings(options: argparse.Namespace) -> Settings:
    placement = options.placement
    if placement not in ("auto", "balanced") and not os.path.isfile(placement):
        raise UsageError(
            f"--placement: {placement!r} is neither balanced, auto nor a file; give a device map "
            "in JSON"
        )
    return Settings(
        tier=options.tier,
        dtype=options.dtype,
        model=options.model,
        weights="synthetic" if options.weights == "synthetic" else "auto",
        placement=placement,
        context=options.context or DEFAULT_CONTEXT,
        batch=options.batch,
    )


def _fit(probe: Probe, architecture: Architecture) -> ProbeFit:
    return ProbeFit(
        probe_hidden=probe.hidden_size,
        model_hidden=architecture.hidden_size,
        probe_layers=probe.layers,
        model_layers=architecture.layers,
        probe_model=probe.model,
        model=architecture.model,
    )


def _misfits(records: Sequence[Record], options: argparse.Namespace) -> list[str]:
    """What to say of a probe that may not be this model's; said on stderr.

    :raises ScoringError: it is not, and nobody said to score all the same; or it can't be scored.
    """
    said = []
    for record in records:
        if record.outcome == "passed":
            continue
        text = sentence(record)
        hopeless = record.name in ("probe hidden size", "probe layers")
        if record.outcome == "failed" and (hopeless or not options.despite_misfit):
            more = "" if hopeless else "; --despite-misfit scores all the same"
            raise ScoringError(f"{text}{more}")
        prefix = "not measured: " if record.outcome == "unknown" else ""
        said.append(f"{prefix}{text}")
    for text in said:
        print(f"warning: {text}", file=sys.stderr)
    return said


def _prepared(
    resolved: Any,
    architecture: Architecture,
    probe: Probe,
    path: Path,
    transcripts: Sequence[Transcript],
    options: argparse.Namespace,
) -> list[Chat]:
    """Every text, tokenised; each has a token to score and a length that the model can read.

    :raises ScoringError: one has not; names it.
    """
    from ..model.meta import load_config
    from ..model.tokenizer import tokenizer_for
    from ..probes.scoring import check_rows, context_of

    try:
        tokenizer, note = tokenizer_for(
            resolved.checkpoint, architecture.vocab_size, architecture.max_context
        )
    except ValueError as error:
        raise ScoringError(f"{error}; give a model with a tokenizer") from error
    if note is not None and options.weights != "synthetic":
        raise ScoringError(
            f"{note}, and scores need the model's own; put its files into the folder"
        )
    context = context_of(load_config(resolved))
    chats = []
    for transcript in transcripts:
        where = f"{path}, text {transcript.name}"
        try:
            chat = tokenize_chat(tokenizer, transcript.messages)
            chat.mask(probe.mask)
            check_rows([chat.input_ids], known=architecture.vocab_size, context=context)
        except ScoringError as error:
            raise ScoringError(f"{where}: {error}") from error
        if options.context is not None and len(chat.input_ids) > options.context:
            raise ScoringError(
                f"{where}: has {len(chat.input_ids)} tokens, more than --context "
                f"{options.context}; raise it"
            )
        chats.append(chat)
    return chats


def _load(session: GpuSession, line: Line) -> LoadedModel:
    """:raises LoadError: no plan fits."""
    session.on_progress = lambda progress: line.show(loading(progress))
    session.start(Wanted(model=True, plan=True, ours=True))
    lacking = session.plans.why_no_model()
    if lacking is not None:
        remedies = session.plan.remedies
        raise LoadError(f"{lacking}; {remedies[0]}" if remedies else lacking)
    loaded = session.load()
    line.clear()
    return loaded


def _size(loaded: LoadedModel, probe: Probe, chats: Sequence[Chat]) -> Record:
    """Of the text with the most scored tokens among the short ones; of the shortest if none is."""
    from ..probes.invariants.fit import read_chat_sizes

    if loaded.load.weights == "synthetic" or probe.scale is None:
        return unmeasured_size(synthesised=loaded.load.weights == "synthetic")
    short = [chat for chat in chats if len(chat.input_ids) <= _SAMPLE_TOKENS]
    chat = (
        max(short, key=lambda chat: sum(chat.mask(probe.mask)))
        if short
        else min(chats, key=lambda chat: len(chat.input_ids))
    )
    return judge_size(read_chat_sizes(loaded.model, probe, chat), source=probe.source)


def _shown_size(size: Record) -> str:
    if not isinstance(size.measured, float):
        return ""
    return f"; activations are {size.measured:.3g} times the size that it was fitted on"


def _score(
    loaded: LoadedModel,
    probe: Probe,
    path: Path,
    transcripts: Sequence[Transcript],
    chats: Sequence[Chat],
    batch: int,
    line: Line,
) -> list[Score]:
    from ..probes.scoring import score_tokens

    scores: list[Score] = []
    began, tokens = time.monotonic(), 0
    total = sum(len(chat.input_ids) for chat in chats)
    for start in range(0, len(chats), batch):
        group = chats[start : start + batch]
        rows, masks = [c.input_ids for c in group], [c.mask(probe.mask) for c in group]
        try:
            scores += score_tokens(loaded.model, probe, rows, masks)
        except ScoringError as error:
            names = " to ".join(
                dict.fromkeys(
                    (transcripts[start].name, transcripts[len(scores) + len(group) - 1].name)
                )
            )
            raise ScoringError(f"{path}, text {names}: {error}") from error
        tokens += sum(map(len, rows))
        left = (time.monotonic() - began) / tokens * (total - tokens)
        line.show(f"scored {len(scores)} of {len(chats)} texts, {left:.0f} s left")
    return scores
