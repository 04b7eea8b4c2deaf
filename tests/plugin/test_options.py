"""Every wrong value is one usage error, word for word; every right one reaches Settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_multigpu.errors import UsageError
from pytest_multigpu.options import OPTIONS, Settings, asked, resolve

USAGE_ERROR = pytest.ExitCode.USAGE_ERROR
LONG = "a" * 300
"""No name of a file."""


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
        (
            ["--gpu-context=1000000001"],
            "--gpu-context: 1000000001 is out of range; write 1000000000 at most",
        ),
        (["--gpu-batch=1.5"], "--gpu-batch: '1.5' is not a number; write it like 1"),
        (["--gpu-wait=-1"], "--gpu-wait: -1 is out of range; write 0 to 3600 seconds"),
        (["--gpu-wait=nan"], "--gpu-wait: nan is out of range; write 0 to 3600 seconds"),
        (["--gpu-wait=10s"], "--gpu-wait: '10s' is not a number; write it like 10"),
        (["--gpu-report=file"], "--gpu-report: 'file' is a file; give a folder"),
        (["--gpu-report=file/a/b"], "--gpu-report: 'file' is a file; give a folder"),
        (["--gpu-baseline=."], "--gpu-baseline: '.' is a folder; give a file"),
        # As a folder that may not be entered: the system does not tell.
        *(
            ([f"{option}={LONG}"], f"{option}: {LONG!r}: File name too long; check the path")
            for option in ("--gpu-placement", "--gpu-report", "--gpu-baseline")
        ),
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
    found = settings(pytester, "--gpu-config=game.json")
    assert (found.tier, found.model, found.context) == ("8bit", "llama-3.2-1b", 4096)
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
    assert "GPU types and prices in JSON, changing or adding to the built-in ones" in " ".join(
        text.split()
    )


@pytest.mark.parametrize("option", [option.name for option in OPTIONS if option.metavar])
def test_an_empty_value_is_refused(pytester: pytest.Pytester, option: str) -> None:
    metavar = next(one.metavar for one in OPTIONS if one.name == option)
    result = pytester.runpytest(f"{option}=")
    assert result.ret == USAGE_ERROR
    assert f"ERROR: {option}: is empty; give {metavar}, or leave it out" in result.errlines
    assert not Path("report.json").exists()


def test_an_empty_ini_value_is_none(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ngpu_report =\ngpu_model =\n")
    assert settings(pytester) == Settings()


@pytest.mark.parametrize("key", ["gpu_strict", "gpu_checks", "gpu_plan"])
def test_a_flag_in_the_ini_file_that_is_none(pytester: pytest.Pytester, key: str) -> None:
    pytester.makeini(f"[pytest]\n{key} = maybe\n")
    result = pytester.runpytest()
    assert result.ret == USAGE_ERROR
    assert f"ERROR: {key}: invalid truth value 'maybe'; write true or false" in result.errlines


@pytest.mark.parametrize(
    ("ini", "args", "about_gpus"),
    [
        ("", [], False),
        ("gpu_strict = true", [], True),
        ("gpu_tier = 16bit", [], True),
        ("gpu_tier = nf4", [], True),
        ("gpu_tier = auto", [], False),
        ("gpu_tier = cpu", [], False),
        ("gpu_report = out", [], False),
        ("gpu_config = game.json", [], False),
        ("", ["--gpu-tier=auto"], True),
        ("", ["--gpu-wait=0"], True),
    ],
)
def test_what_makes_any_run_one_about_gpus(
    pytester: pytest.Pytester, ini: str, args: list[str], about_gpus: bool
) -> None:
    pytester.makeini(f"[pytest]\n{ini}\n")
    assert asked(pytester.parseconfig(*args)) is about_gpus


def test_strict_in_the_ini_file_is_as_strict(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ngpu_strict = true\ngpu_tier = 16bit\n")
    pytester.makepyfile("def test_x(): pass")
    result = pytester.runpytest()
    assert result.ret == 1
    assert result.outlines[-1] == "NOT READY: no check was executed (1 own test passed)"


@pytest.mark.parametrize("where", ["command line", "ini"])
def test_a_simulated_machine_satisfies_no_strict_gate(
    pytester: pytest.Pytester, where: str
) -> None:
    args = ["--gpu-strict"]
    if where == "ini":
        pytester.makeini("[pytest]\ngpu_simulate = 4xA6000\n")
    else:
        args.append("--gpu-simulate=4xA6000")
    result = pytester.runpytest(*args)
    assert result.ret == USAGE_ERROR
    assert (
        "ERROR: --gpu-strict: nothing can be demanded of a machine that isn't there, "
        "--gpu-simulate=4xA6000; leave out one of them, also in the ini file"
    ) in result.errlines
    # Planning for a machine before it is rented demands nothing.
    assert settings(pytester, *args, "--gpu-plan").simulate == "4xA6000"


def test_paths_of_the_ini_file_are_seen_from_its_folder(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini(
        "[pytest]\ngpu_config = game.json\ngpu_report = out\ngpu_baseline = base.json\n"
        "gpu_placement = map.json\ngpu_model = checkpoint\ngpu_probe = probe.json\n"
    )
    here = pytester.path
    for name in ("game.json", "map.json", "probe.json"):
        (here / name).write_text("{}")
    (here / "checkpoint").mkdir()
    (here / "tests" / "deep").mkdir(parents=True)
    monkeypatch.chdir(here / "tests" / "deep")
    found = settings(pytester)
    assert (found.config_file, found.report_dir) == (here / "game.json", here / "out")
    assert (found.baseline, found.probe) == (here / "base.json", here / "probe.json")
    assert (found.placement, found.model) == (str(here / "map.json"), str(here / "checkpoint"))
    # The command line is seen from where pytest was started.
    with pytest.raises(UsageError, match=r"--gpu-probe: no file 'probe\.json'"):
        settings(pytester, "--gpu-probe=probe.json")
    assert settings(pytester, "--gpu-report=out").report_dir == Path("out")


def test_a_preset_in_the_ini_file_is_no_path(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ngpu_model = llama-3.1-8b\ngpu_placement = balanced\n")
    found = settings(pytester)
    assert (found.model, found.placement) == ("llama-3.1-8b", "balanced")


@pytest.mark.parametrize("args", [["--help"], ["--markers"], ["--fixtures"], ["--version"], []])
def test_a_bad_game_config_breaks_no_run_that_is_about_something_else(
    pytester: pytest.Pytester, args: list[str]
) -> None:
    pytester.makeini("[pytest]\ngpu_config = game.json\ngpu_probe = nowhere.pt\n")
    Path("game.json").write_text("{")
    pytester.makepyfile("def test_x(): pass")
    result = pytester.runpytest(*args)
    assert result.ret == 0
    assert "ERROR" not in result.stderr.str()


@pytest.mark.parametrize("args", [["--help"], ["--markers"], ["--version"]])
def test_asking_for_help_is_no_run(pytester: pytest.Pytester, args: list[str]) -> None:
    assert pytester.runpytest(*args, "--gpu-tier=32bit").ret == 0


def test_a_bad_game_config_is_one_usage_error_once_a_test_is_about_gpus(
    pytester: pytest.Pytester,
) -> None:
    pytester.makeini("[pytest]\ngpu_config = game.json\n")
    Path("game.json").write_text('{"quantization_bits": 5}')
    pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_x(): pass")
    result = pytester.runpytest()
    assert result.ret == USAGE_ERROR
    assert [line for line in result.errlines if line] == [
        f"ERROR: {pytester.path}/game.json: quantization_bits: 5 is not known; write 4, 8 or 16"
    ]


@pytest.mark.parametrize(
    ("settings", "takes"),
    [
        (Settings(), True),
        (Settings(tier="4bit"), True),
        (Settings(tier="cpu"), False),
        (Settings(simulate="2xH100"), False),
        (Settings(tier="4bit", simulate="2xH100"), False),
    ],
)
def test_the_cpu_tier_and_a_simulated_machine_take_no_gpu(settings: Settings, takes: bool) -> None:
    assert settings.takes_gpus is takes
