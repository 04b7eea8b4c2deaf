"""AUROC, rank correlation, and transcripts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from pytest_multigpu.errors import ScoringError, UsageError
from pytest_multigpu.probes.metrics import auroc, ranks, spearman
from pytest_multigpu.probes.scoring import Score
from pytest_multigpu.probes.synthetic import synthetic_probe
from pytest_multigpu.probes.transcripts import Transcript, read_transcripts, table


def test_auroc_by_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 40).astype(float).tolist()
    labels = (rng.random(40) < 0.4).tolist()
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, x in zip(scores, labels, strict=True)
        for b, y in zip(scores, labels, strict=True)
        if x and not y
    ]
    found = auroc(scores, labels)
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.low < found.value < found.high
    assert found == auroc(scores, labels)
    perfect = auroc([1.0, 2.0, 3.0, 4.0], [False, False, True, True])
    assert (perfect.value, perfect.low, perfect.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ScoringError, match=r"^AUROC needs texts of both labels$"):
        auroc([1.0, 2.0], [True, True])
    with pytest.raises(ScoringError, match=r"^AUROC needs one finite score for each label$"):
        auroc([1.0, float("nan")], [True, False])


def test_rank_correlation() -> None:
    assert ranks([10.0, 30.0, 20.0, 20.0]).tolist() == [1, 4, 2.5, 2.5]
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Spearman's textbook formula, no ties: 1 - 6 sum(d^2) / (n (n^2 - 1)).
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    with pytest.raises(ScoringError, match="scores that differ"):
        spearman([1, 1, 1], [1, 2, 3])


def test_transcripts_and_their_table(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    said = [{"role": "assistant", "content": "x"}]
    lines = [
        json.dumps({"id": "game\n1", "messages": said, "label": True}),
        "",
        json.dumps({"messages": said, "label": 0}),
        json.dumps(said),
    ]
    path.write_text("\n".join(lines))
    found = read_transcripts(path)
    assert [(t.name, t.label) for t in found] == [("game\\n1", True), ("3", False), ("4", None)]
    probe = dataclasses.replace(synthetic_probe(4, 4), threshold=0.5, positive_class="deceptive")
    scores = [Score(value=v, tokens=(v,), positions=(0,)) for v in (1.25, 0.5, -3.0)]
    assert table(probe, found, scores) == [
        "text            score  tokens  label  verdict",
        "game\\n1          1.25       1      1  deceptive",
        "3                 0.5       1      0  not deceptive",
        "4                  -3       1      -  not deceptive",
        "AUROC 1.000 (95% 1.000 to 1.000; 1 positive, 1 negative)",
    ]


def test_line_breaks_that_json_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    texts = ["one\u2028two", "one\u2029two", "one\x85two", "one\x1dtwo", "one\x0btwo"]
    # The control characters below U+0020 must be escaped; the others may stand as they are.
    lines = [
        json.dumps([{"role": "assistant", "content": t}], ensure_ascii=t in texts[3:])
        for t in texts
    ]
    path.write_text("\r\n".join(lines) + "\n", encoding="utf-8", newline="")
    assert [t.messages[0]["content"] for t in read_transcripts(path)] == texts


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_class_say_why_there_is_no_auroc(label: bool) -> None:
    said = ({"role": "assistant", "content": "x"},)
    found = [Transcript(name=str(n), messages=said, label=label) for n in range(3)]
    scores = [Score(value=float(n), tokens=(1.0,), positions=(0,)) for n in range(3)]
    assert table(synthetic_probe(4, 4), found, scores)[-1] == (
        f"no AUROC: all 3 labels are {int(label)}; it needs texts of both"
    )
    unlabelled = [dataclasses.replace(t, label=None) for t in found]
    assert table(synthetic_probe(4, 4), unlabelled, scores)[-1].startswith("2 ")


def test_unreadable_transcripts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"\xff")
    for name, reason in (
        ("pipe", "it is a named pipe, not a regular file"),
        (".", "it is a folder, not a regular file"),
        ("none", "No such file or directory"),
    ):
        with pytest.raises(UsageError) as error:
            read_transcripts(tmp_path / name)
        assert str(error.value) == (
            f"{tmp_path / name}: cannot be read as text: {reason}; check the path"
        )
    with pytest.raises(UsageError, match="'utf-8' codec can't decode byte 0xff"):
        read_transcripts(tmp_path / "latin")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "is not valid JSON; write one object a line"),
        ("{}", "messages: is not a list of messages"),
        ('[{"role": "user"}]', "messages: each needs role and content as text"),
        (
            '{"messages": [{"role": "user", "content": "x"}], "label": "yes"}',
            "label: 'yes' is not true, false, 1 or 0",
        ),
    ],
)
def test_damaged_transcripts(tmp_path: Path, line: str, text: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError) as error:
        read_transcripts(path)
    assert str(error.value) == f"{path}, line 1: {text}"
