"""Every wrong value is one usage error, word for word; every right one reaches Settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_multigpu.errors import UsageError
from pytest_multigpu.options import Settings, resolve

USAGE_ERROR = pytest.ExitCode.USAGE_ERROR


def settings(pytester: pytest.Pytester, *args: str) -> Settings:
    return resolve(pytester.parseconfig(*args))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--gpu-tier=32bit"],
            "--gpu-tier: unknown tier '32bit'; known: auto, cpu, 4bit, 8bit, 16bit "
            "(also nf4, int8, bf16, fp16)",
        ),
        (
            ["--gpu-weights=real"],
            "--gpu-weights: unknown kind 'real'; known: auto, synthetic, checkpoint",
        ),
        (
            ["--gpu-placement=map.json"],
            "--gpu-placement: 'map.json' is neither auto, balanced nor a file; "
            "give a device_map in JSON",
        ),
        (["--gpu-probe=no.pt"], "--gpu-probe: no file 'no.pt'; check the path"),
        (["--gpu-config=no.json"], "--gpu-config: no file 'no.json'; check the path"),
        (
            ["--gpu-context=many"],
            "--gpu-context: 'many' is not a number; write it like 2048",
        ),
        (["--gpu-context=0"], "--gpu-context: 0 is out of range; write 1 or more"),
        (["--gpu-batch=1.5"], "--gpu-batch: '1.5' is not a number; write it like 1"),
        (["--gpu-wait=-1"], "--gpu-wait: -1 is out of range; write 0 to 3600 seconds"),
        (["--gpu-wait=nan"], "--gpu-wait: nan is out of range; write 0 to 3600 seconds"),
        (["--gpu-wait=10s"], "--gpu-wait: '10s' is not a number; write it like 10"),
        (["--gpu-report=file"], "--gpu-report: 'file' is a file; give a folder"),
        (["--gpu-baseline=."], "--gpu-baseline: '.' is a folder; give a file"),
    ],
)
def test_wrong_values(pytester: pytest.Pytester, args: list[str], message: str) -> None:
    Path("file").touch()
    with pytest.raises(UsageError) as caught:
        settings(pytester, *args)
    assert str(caught.value) == message
    result = pytester.runpytest(*args)
    assert result.ret == USAGE_ERROR
    assert f"ERROR: {message}" in result.errlines


@pytest.mark.parametrize(
    ("word", "tier", "dtype"),
    [
        ("auto", "auto", "bfloat16"),
        ("cpu", "cpu", "bfloat16"),
        ("4bit", "4bit", "bfloat16"),
        ("NF4", "4bit", "bfloat16"),
        ("int8", "8bit", "bfloat16"),
        ("bf16", "16bit", "bfloat16"),
        ("fp16", "16bit", "float16"),
    ],
)
def test_tier_words(pytester: pytest.Pytester, word: str, tier: str, dtype: str) -> None:
    found = settings(pytester, f"--gpu-tier={word}")
    assert (found.tier, found.dtype) == (tier, dtype)


def test_defaults(pytester: pytest.Pytester) -> None:
    assert settings(pytester) == Settings()


def test_command_line_before_game_before_ini(pytester: pytest.Pytester) -> None:
    pytester.makeini(
        "[pytest]\ngpu_tier = 16bit\ngpu_context = 4096\ngpu_model = llama-3.1-8b\n"
        "gpu_strict = true\n"
    )
    Path("game.json").write_text('{"quantization_bits": 8, "model": "llama-3.2-1b"}')
    found = settings(pytester)
    assert (found.tier, found.context, found.strict) == ("16bit", 4096, True)
    assert not found.asked
    found = settings(pytester, "--gpu-config=game.json")
    assert (found.tier, found.model, found.context) == ("8bit", "llama-3.2-1b", 4096)
    assert found.asked
    found = settings(pytester, "--gpu-config=game.json", "--gpu-tier=4bit")
    assert (found.tier, found.model) == ("4bit", "llama-3.2-1b")


def test_the_cpu_tier_takes_the_built_in_model(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ngpu_model = llama-3.3-70b\n")
    assert settings(pytester, "--gpu-tier=cpu").model == "tiny-llama"
    assert settings(pytester, "--gpu-tier=cpu", "--gpu-model=x").model == "x"


def test_a_wrong_game_config_ends_the_run_in_one_line(pytester: pytest.Pytester) -> None:
    Path("game.json").write_text("{")
    result = pytester.runpytest("--gpu-config=game.json")
    assert result.ret == USAGE_ERROR
    assert [line for line in result.errlines if line] == [
        "ERROR: game.json: malformed JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)"
    ]


def test_help_shows_every_option(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("--help")
    assert result.ret == 0
    text = result.stdout.str()
    assert "--gpu-tier=TIER" in text
    assert "peak:2%+256MiB" in text
