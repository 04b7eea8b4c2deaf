"""``python -m pytest_multigpu.probes score``: what is known before loading, and what after."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.model import loading
from pytest_multigpu.model.tokenizer import built_in_tokenizer
from pytest_multigpu.planning.catalogue import CATALOGUE
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.probe_cli import score as scoring
from pytest_multigpu.probe_cli.line import Line
from pytest_multigpu.probe_cli.main import main
from pytest_multigpu.probes.alone import Alone
from pytest_multigpu.probes.formats import load_probe, save_probe
from pytest_multigpu.probes.formats.writing import write_probe
from pytest_multigpu.probes.invariants import fit
from pytest_multigpu.probes.probe import Probe
from pytest_multigpu.probes.scoring import score_chats
from pytest_multigpu.probes.synthetic import synthetic_probe
from pytest_multigpu.records.machine import Machine

HIDDEN, LAYERS = 64, 6
CHATS = [
    [{"role": "user", "content": "Did you?"}, {"role": "assistant", "content": answer}]
    for answer in ("No.", "I did not, as I said.", "Yes", "Never, ever.")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    """A checkpoint with its tokenizer, a probe with a scaler that fits, and four transcripts."""
    where = tmp_path_factory.mktemp("scoring")
    model.save_pretrained(where / "model")
    tokenizer.save_pretrained(where / "model")
    fitted = fit.with_scaler(Alone(model, tokenizer, synthetic_probe(HIDDEN, LAYERS, layers=(3,))))
    save_probe(fitted, where / "probe.safetensors")
    write_transcripts(where / "t.jsonl", CHATS, [0, 1, 0, 1])
    return where


def write_transcripts(
    path: Path, chats: Sequence[Any], labels: Sequence[Any] | None = None
) -> Path:
    rows = [{"id": f"game-{i}", "messages": chat} for i, chat in enumerate(chats)]
    for row, label in zip(rows, labels or (), strict=False):
        row["label"] = label
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


Score = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def score(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Score:
    """Exit code, stdout and stderr; options in place of the module's files."""

    def run(
        *arguments: object,
        probe: Probe | None = None,
        chats: Sequence[Any] | None = None,
        model: object = None,
        tier: str = "cpu",
    ) -> tuple[int, str, str]:
        capsys.readouterr()
        given = folder / "probe.safetensors"
        if probe is not None:
            given, _ = save_probe(probe, tmp_path / "given.safetensors")
        texts = folder / "t.jsonl"
        if chats is not None:
            texts = write_transcripts(tmp_path / "given.jsonl", chats)
        named = ["score", texts, "--probe", given, "--model", model or folder / "model"]
        code = main([*map(str, named), "--tier", tier, "--dtype", "float32", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each model that is loaded."""
    made: list[str] = []
    real = loading.load_model

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(str(arguments[0]))
        return real(*arguments, **options)

    monkeypatch.setattr(loading, "load_model", counted)
    return made


def test_the_same_scores_as_in_memory(
    score: Score, folder: Path, model: Any, tmp_path: Path
) -> None:
    code, printed, said = score("--batch", 3, "--out", tmp_path / "out.json")
    assert (code, said) == (0, "")
    lines = printed.splitlines()
    assert lines[0] == "text           score  tokens  label  verdict"
    assert [line.split()[0] for line in lines[1:5]] == ["game-0", "game-1", "game-2", "game-3"]
    assert lines[5].startswith("AUROC ")
    assert lines[6].startswith(
        f"weights: checkpoint; probe: {folder / 'probe.safetensors'}; activations are "
    )
    assert lines[6].endswith(" times the size that it was fitted on")
    kept = json.loads((tmp_path / "out.json").read_text())
    probe = load_probe(folder / "probe.safetensors")
    expected = score_chats(model, built_in_tokenizer(), probe, CHATS)
    assert [row["value"] for row in kept["scores"]] == pytest.approx(
        [one.value for one in expected], rel=1e-4
    )
    assert [row["positions"] for row in kept["scores"]] == [list(s.positions) for s in expected]
    assert (kept["weights"], kept["tier"], kept["misfits"]) == ("checkpoint", "cpu", [])
    assert kept["auroc"]["positives"] == 2
    assert 0.5 < kept["activation_size"] < 2


# Known before anything is loaded


def before_loading(
    score: Score, loads: list[str], reason: str, *arguments: object, **given: Any
) -> None:
    code, printed, said = score(*arguments, **given)
    assert (code, printed) == (2, "")
    assert said == f"error: {reason}\n"
    assert loads == []


OWN = "--gpu-probe=FILE with a probe of this model"


def test_a_probe_of_another_shape(score: Score, loads: list[str]) -> None:
    wide = synthetic_probe(HIDDEN * 2, LAYERS)
    reason = f"the probe was fitted on a model of another hidden size; {OWN}"
    before_loading(score, loads, reason, probe=wide)
    before_loading(score, loads, reason, "--despite-misfit", probe=wide)
    deep = synthetic_probe(HIDDEN, 80, layers=(22,))
    reason = f"layer 22 is out of range for 6 layers; {OWN}"
    before_loading(score, loads, reason, probe=deep)
    before_loading(score, loads, reason, "--despite-misfit", probe=deep)


def test_a_probe_of_another_model(score: Score, loads: list[str], folder: Path) -> None:
    probe = load_probe(folder / "probe.safetensors")
    other = dataclasses.replace(probe, model="acme/Other-9B")
    preset = {"model": "tiny-llama", "probe": other}
    text = f"the probe was fitted on another model; {OWN}"
    before_loading(
        score,
        loads,
        f"{text}; --despite-misfit scores all the same",
        "--weights",
        "synthetic",
        **preset,
    )
    code, printed, said = score("--weights", "synthetic", "--despite-misfit", **preset)
    assert (code, said) == (0, f"warning: {text}\n")
    assert "game-3" in printed
    # A folder's name tells nothing: said, and no more.
    assert score(probe=other)[2].startswith("warning: the model is a folder, whose name does not")


def test_synthesised_weights_are_asked_for_by_name(
    score: Score, loads: list[str], tmp_path: Path
) -> None:
    before_loading(
        score,
        loads,
        "no checkpoint of 'tiny-llama' on this machine, and scores of synthesised weights mean "
        "nothing; give its folder as --model, or try the machinery with --weights synthetic",
        model="tiny-llama",
    )
    out = tmp_path / "out.json"
    labelled = dataclasses.replace(synthetic_probe(HIDDEN, LAYERS), threshold=0.0)
    code, printed, said = score(
        "--weights", "synthetic", "--out", out, model="tiny-llama", probe=labelled
    )
    assert (code, said, len(loads)) == (0, "", 1)
    lines = printed.splitlines()
    meaningless = "weights are synthesised: these scores try the machinery and mean nothing"
    assert lines[0] == lines[-1] == meaningless
    assert "no AUROC: the weights are synthesised" in lines
    # Not even a verdict.
    assert {line.split()[-1] for line in lines[2:6]} == {"-"}
    assert json.loads(out.read_text())["auroc"] is None


def test_a_checkpoint_without_its_tokenizer(
    score: Score, loads: list[str], tmp_path: Path, model: Any
) -> None:
    """Another tokenizer's tokens would be scored."""
    model.save_pretrained(tmp_path / "model")
    before_loading(
        score,
        loads,
        "the checkpoint has no tokenizer; the built-in byte-level tokenizer stands in, and scores "
        "need the model's own; put its files into the folder",
        model=tmp_path / "model",
    )


def chat(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("chats", "arguments", "text"),
    [
        (
            [chat("fine"), chat("x" * 600)],
            (),
            "text game-1: a text of 625 tokens is longer than the model's context of 512; shorten "
            "it",
        ),
        (
            [chat("fine"), chat("x" * 100)],
            ("--context", 100),
            "text game-1: has 125 tokens, more than --context 100; raise it",
        ),
        (
            [[{"role": "user", "content": "alone"}]],
            (),
            "text game-0: no token to score: the chat has no text of assistant",
        ),
    ],
)
def test_texts_that_cannot_be_scored(
    score: Score,
    loads: list[str],
    tmp_path: Path,
    chats: Any,
    arguments: tuple[object, ...],
    text: str,
) -> None:
    reason = f"{tmp_path / 'given.jsonl'}, {text}"
    before_loading(score, loads, reason, *arguments, chats=chats)


def test_where_scores_are_to_go(
    score: Score, loads: list[str], tmp_path: Path, folder: Path
) -> None:
    before_loading(
        score, loads, f"--out: '{tmp_path}' is no file; give a file's name", "--out", tmp_path
    )
    missing = tmp_path / "no" / "out.json"
    before_loading(
        score, loads, f"--out: there is no folder '{missing.parent}'; make it", "--out", missing
    )
    for name in ("probe.safetensors", "probe.json", "t.jsonl"):
        path = folder / name
        before_loading(
            score, loads, f"--out: '{path}' is what is read; give another name", "--out", path
        )
    long = tmp_path / ("x" * 300) / "out.json"
    before_loading(
        score, loads, f"--out: there is no folder '{long.parent}'; make it", "--out", long
    )


def test_a_linear_head_in_the_current_folder(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    head = synthetic_probe(HIDDEN, LAYERS, layers=(3,))
    write_probe(head, tmp_path / "head")
    monkeypatch.chdir(tmp_path / "head")
    code, printed, _ = score("--probe", ".", "--out", "out.json")
    assert code == 0
    assert "; probe: probe.safetensors" in printed
    assert len(json.loads((tmp_path / "head" / "out.json").read_text())["scores"]) == 4


def test_a_disk_that_fills_up_while_scoring(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is there all the same."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scoring, "write_json", full)
    code, printed, said = score("--out", tmp_path / "out.json")
    assert code == 2
    assert "game-3" in printed
    assert said == (
        f"error: --out: {tmp_path / 'out.json'}: cannot be written: No space left on device\n"
    )


def test_no_gpu_is_said_and_nothing_runs_on_the_cpu(
    score: Score, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_multigpu.machine import nvml

    monkeypatch.setattr(nvml, "read_machine", lambda _: Machine())
    code, printed, said = score(tier="16bit")
    assert (code, printed, loads) == (2, "", [])
    assert said.startswith(
        "error: needs tier 16bit; 0.0 GiB of weights have no GPU to go to: needs 1 GPU; found no "
        "GPU"
    )


def one_gpu(free: int) -> Machine:
    machine = simulate("1xH100", CATALOGUE)
    (gpu,) = machine.gpus
    gpus = (dataclasses.replace(gpu, free_bytes=free),)
    return dataclasses.replace(machine, gpus=gpus, simulated=None)


@pytest.mark.parametrize(
    ("placement", "device_map"), [("balanced", {"": 0}), ("auto", None), ("file", {"": 0})]
)
def test_the_model_is_placed_as_planned(
    score: Score,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    placement: str,
    device_map: Any,
) -> None:
    """With room for the longest text of a batch; a plan that does not fit is refused."""
    from pytest_multigpu.errors import LoadError
    from pytest_multigpu.machine import nvml

    monkeypatch.setattr(nvml, "read_machine", lambda _: one_gpu(80 << 30))
    given: dict[str, Any] = {}

    def stop(*_: Any, **options: Any) -> Any:
        given.update(options)
        raise LoadError("far enough")

    monkeypatch.setattr(loading, "load_model", stop)
    (tmp_path / "map.json").write_text('{"": 0}')
    named = tmp_path / "map.json" if placement == "file" else placement
    code, _, said = score("--placement", named, "--batch", 2, tier="16bit")
    assert (code, said) == (2, "error: far enough\n")
    plan = given["plan"]
    assert plan.fits
    # "Did you?" and "I did not, as I said." in bytes, and the template's tokens.
    assert (plan.batch, plan.context_tokens) == (2, 53)
    if device_map is not None:
        assert set(given["device_map"].values()) == {0}
    monkeypatch.setattr(nvml, "read_machine", lambda _: one_gpu(1 << 20))
    code, _, said = score("--placement", named, "--batch", 2, tier="16bit")
    assert code == 2
    assert said.startswith("error: needs tier 16bit; ")


def test_a_placement_that_is_none(score: Score, loads: list[str]) -> None:
    before_loading(
        score,
        loads,
        "--placement: 'nowhere' is neither balanced, auto nor a file; give a device map in JSON",
        "--placement",
        "nowhere",
    )


# Once it is loaded


def test_a_probe_of_another_place(score: Score, folder: Path, tmp_path: Path) -> None:
    probe = load_probe(folder / "probe.safetensors")
    wrong = dataclasses.replace(probe, layers=(0,))
    code, printed, said = score(probe=wrong)
    assert (code, printed) == (2, "")
    assert said.startswith("error: activations at layer 0, site raw, are 0.000")
    assert "; layer 3, site raw, would fit (1.0" in said
    assert said.endswith("; --despite-misfit scores all the same\n")
    # The command that it names, as it is printed.
    command = said.partition("pytest_multigpu.probes ")[2].partition(", and ")[0].split()
    command[2] = str(tmp_path / command[2])
    assert command == ["convert", str(tmp_path / "given.safetensors"), command[2], "--layer", "3"]
    assert main(command) == 0
    assert score(probe=load_probe(command[2]))[0] == 0
    out = tmp_path / "out.json"
    code, printed, said = score("--despite-misfit", "--out", out, probe=wrong)
    assert code == 0
    assert said.startswith("warning: activations at layer 0, site raw, are 0.000")
    assert "game-3" in printed
    kept = json.loads(out.read_text())
    assert len(kept["misfits"]) == 1
    assert kept["activation_size"] < 0.001


def test_a_probe_that_tells_no_size(score: Score) -> None:
    code, _, said = score(probe=synthetic_probe(HIDDEN, LAYERS, layers=(3,)))
    assert code == 0
    assert said == (
        "warning: not measured: the probe has no scaler, so nothing tells whether its layer and "
        "site are right; add mean and scale of the activations that it was fitted on to the "
        "probe's file\n"
    )


def test_the_size_is_read_on_a_text_that_is_short_enough(
    score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = fit.read_chat_sizes

    def noting(model: Any, probe: Probe, chat: Any) -> Any:
        read.append(len(chat.input_ids))
        return real(model, probe, chat)

    monkeypatch.setattr(fit, "read_chat_sizes", noting)
    monkeypatch.setattr(scoring, "_SAMPLE_TOKENS", 100)
    chats = [chat("ab"), chat("abcdef"), chat("x" * 200)]
    assert score(chats=chats)[0] == 0
    monkeypatch.setattr(scoring, "_SAMPLE_TOKENS", 5)
    assert score(chats=chats)[0] == 0
    # The one that says most of the short ones; if none is short, the shortest.
    assert read == [len("abcdef") + 25, len("ab") + 25]


def test_the_text_that_fails_is_named_and_the_model_is_freed(
    score: Score, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_multigpu.errors import ScoringError
    from pytest_multigpu.model import loaded
    from pytest_multigpu.probes import scoring as probes_scoring

    real = probes_scoring.score_tokens
    calls: list[int] = []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ScoringError("the score of scored token 0 is nan, not a number to use")
        return real(*arguments, **options)

    freed: list[Any] = []
    monkeypatch.setattr(loaded, "release", freed.append)
    monkeypatch.setattr(probes_scoring, "score_tokens", failing)
    code, printed, said = score()
    assert (code, printed) == (2, "")
    assert said == (
        f"error: {folder / 't.jsonl'}, text game-1: the score of scored token 0 is nan, not a "
        "number to use\n"
    )
    calls.clear()
    said = score("--batch", 2)[2]
    assert said.startswith(f"error: {folder / 't.jsonl'}, text game-2 to game-3: ")
    assert len(freed) == 2


def test_progress_is_said_now_and_then(
    score: Score, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pytest_multigpu.probe_cli import line

    assert score()[2] == ""
    monkeypatch.setattr(line, "_EVERY_S", 0.0)
    said = score()[2].splitlines()
    # The load's own lines come first.
    texts = [text for text in said if text.startswith("scored ")]
    assert [text.partition(",")[0] for text in texts] == [
        f"scored {number} of 4 texts" for number in (1, 2, 3, 4)
    ]
    assert texts[-1] == "scored 4 of 4 texts, 0 s left"


def test_a_moving_line_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    moving = Line()
    moving.show("a long line")
    moving.show("short")
    moving.clear()
    moving.clear()
    assert capsys.readouterr().err == "\ra long line\rshort      \r     \r"


def test_interrupted(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "_score", stop)
    assert score() == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "9" * 5000, "²"])
def test_numbers_that_are_none(score: Score, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        score("--batch", text)
    assert stopped.value.code == 2
    assert "is not a whole number from 1 up" in capsys.readouterr().err


def test_pytest_s_names_of_the_options_are_taken(score: Score) -> None:
    """Remedies of plans and models name those."""
    assert score("--gpu-placement=balanced", "--gpu-context=512", "--gpu-batch=2")[0] == 0


def test_files_that_are_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["score", str(folder / "no.jsonl"), "--model", "tiny-llama", "--probe"]
    assert main([*names, "no.pt"]) == 2
    assert capsys.readouterr().err == "error: no.pt: no such file; check the path\n"
    assert main([*names, str(folder / "probe.safetensors")]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder / 'no.jsonl'}: cannot be read as text: No such file or directory; check "
        "the path\n"
    )
