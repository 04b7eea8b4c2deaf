"""Own tests without the shipped checks get the same: gates, plots, limits, a calm line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_multigpu.machine import nvml
from pytest_multigpu.machine.fake import FakeNvml

SUPPORT = Path(__file__).parents[1] / "support"
Run = Callable[..., pytest.RunResult]
USAGE_ERROR = pytest.ExitCode.USAGE_ERROR
WITH_MODEL = "def test_x(gpu_model): pass"
BY_NAME = "def test_x(request): request.getfixturevalue('gpu_model')"
BY_MARK = "import pytest\n@pytest.mark.gpu_tier('16bit')\ndef test_x(): pass"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fake H100s."""
    fake = FakeNvml(2)
    monkeypatch.setattr(nvml, "load_nvml", lambda: fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def without_gpu(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """In a process of its own: a plan imports torch, which pytester would import twice."""
    monkeypatch.setenv("PYTHONPATH", f"{SUPPORT}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_GPUS", "0")

    def start(source: str, *args: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess("-p", "fake_machine", *args)

    return start


@pytest.mark.parametrize("source", [WITH_MODEL, BY_NAME, BY_MARK])
def test_a_model_that_was_demanded_is_a_shortfall_however_it_is_asked_for(
    without_gpu: Run, source: str
) -> None:
    result = without_gpu(source, "--gpu-tier=16bit")
    assert result.ret == 10
    assert result.outlines[-1].startswith("NOT READY: needs ")
    assert "131.4 GiB of weights have no GPU to go to" in result.outlines[-1]


def test_a_model_that_was_not_demanded_skips(without_gpu: Run) -> None:
    result = without_gpu(WITH_MODEL, "-rs")
    result.assert_outcomes(skipped=1)
    assert result.ret == 0
    assert "needs a tier that fits; " in result.stdout.str()
    assert result.outlines[-1] == "NOT CHECKED: 1 skipped, no shipped check ran"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("source", [WITH_MODEL, BY_MARK, "def test_x(gpu_plan): pass"])
def test_a_model_that_is_none_is_a_usage_error(pytester: pytest.Pytester, source: str) -> None:
    pytester.makepyfile(source)
    result = pytester.runpytest("--gpu-model=nosuch")
    assert result.ret == USAGE_ERROR
    assert any(line.startswith("ERROR: --gpu-model: 'nosuch' is ") for line in result.errlines)


@pytest.mark.usefixtures("gpus")
def test_no_plan_is_made_for_tests_that_need_none(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_x(): pass")
    result = pytester.runpytest("--gpu-model=nosuch")
    assert result.ret == 0


@pytest.mark.usefixtures("gpus")
def test_the_report_has_the_vram_of_the_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import pytest, time\n@pytest.mark.gpu(count=2)\ndef test_x(): time.sleep(0.3)"
    )
    assert pytester.runpytest("--gpu-report=out").ret == 0
    vram = json.loads(Path("out/report.json").read_text())["vram"]
    assert set(vram) == {"cuda:0", "cuda:1"}
    assert len(vram["cuda:0"]["seconds"]) >= 2


def test_a_load_is_shown_as_it_goes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "def test_x(gpu_session):\n"
        "    assert type(gpu_session.on_progress).__name__ == 'ProgressLine'"
    )
    pytester.runpytest("--gpu-tier=cpu").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("source", "args", "code", "colour"),
    [
        ("def test_x(gpu_settings): pass", [], 0, ""),
        ("def test_x(gpu_settings): pass", ["--gpu-strict"], 1, "\x1b[31m"),
        ("def test_x(gpu_settings): assert 0", [], 1, "\x1b[31m"),
    ],
)
def test_the_last_line_is_red_only_where_the_run_failed(
    pytester: pytest.Pytester, source: str, args: list[str], code: int, colour: str
) -> None:
    pytester.makepyfile(source)
    result = pytester.runpytest("--gpu-tier=cpu", "--color=yes", *args)
    assert result.ret == code
    line = result.outlines[-1]
    assert ("\x1b[31m" in line) is bool(colour)
    assert "\x1b[33m" not in line


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="torch can use a GPU here")
@pytest.mark.parametrize("mark", ["gpu_peak_limit", "gpu_leak_limit"])
def test_a_limit_that_could_not_be_measured_fails(
    without_gpu: Run, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    """NVML lists GPUs, and this torch cannot use them."""
    monkeypatch.setenv("FAKE_GPUS", "1")
    result = without_gpu(f"import pytest\n@pytest.mark.{mark}('36GiB')\ndef test_x(): pass")
    result.assert_outcomes(failed=1)
    assert result.ret == 1
    assert result.outlines[-1].endswith(
        f"::test_x failed: GPU 0 was not measured: torch cannot use it; {mark} is 36.0 GiB"
    )
