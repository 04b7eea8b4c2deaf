"""The plans of a run on machines that aren't there: what is chosen, and how auto is mended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from pytest_multigpu.errors import LoadError
from pytest_multigpu.judging.plan import judge_plan
from pytest_multigpu.model import automap
from pytest_multigpu.options import Settings
from pytest_multigpu.planbook import PlanBook
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.plan import Plan, Tier


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for these tests, so that the model is built once for each tier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def chosen(spec: str, tier: Literal["auto"] | Tier, placement: str = "auto") -> Plan:
    settings = Settings(tier=tier, placement=placement)
    return PlanBook(settings, simulate(spec), os.environ).chosen


@pytest.mark.parametrize(
    ("spec", "tier", "call"),
    [("1xH200", "16bit", '{0: "133GiB"}'), ("1xH100", "8bit", '{0: "77GiB"}')],
)
def test_where_auto_fails_and_a_max_memory_mends_it(spec: str, tier: Tier, call: str) -> None:
    plan = chosen(spec, tier)
    assert not plan.fits
    assert plan.mendable
    assert plan.remedies[0].startswith("--gpu-placement=balanced fits: GPU 0 would peak at ")
    assert plan.remedies[1] == (
        f'from_pretrained(..., device_map="auto", max_memory={call}) places it as balanced does'
    )
    assert not [text for text in plan.remedies if text.startswith(("rent", "1 x"))]
    spread = chosen(spec, tier, "balanced")
    assert spread.fits
    assert spread.remedies == ()
    assert spread.max_memory == plan.max_memory is not None


@pytest.mark.parametrize(
    ("spec", "found", "better", "peak"),
    [
        ("1xH200", "8bit", "16bit", r"GPU 0 would peak at 133\.\d GiB of 139\.8 GiB"),
        ("1xH100", "4bit", "8bit", r"GPU 0 would peak at 70\.\d GiB of 79\.2 GiB"),
    ],
)
def test_auto_tier_says_which_better_one_balanced_would_fit(
    spec: str, found: Tier, better: Tier, peak: str
) -> None:
    plan = chosen(spec, "auto")
    assert plan.fits
    assert plan.architecture.tier == found
    (warning,) = plan.warnings
    text = f"{better} does not fit with auto placement; --gpu-tier={better} "
    assert re.fullmatch(rf"{text}--gpu-placement=balanced fits: {peak}", warning)
    spread = chosen(spec, "auto", "balanced")
    assert (spread.architecture.tier, spread.warnings) == (better, ())
    # Asked for by name, it is what is wanted.
    assert chosen(spec, found).warnings == ()


def test_a_better_tier_that_fits_nowhere_is_no_warning(tmp_path: Path) -> None:
    assert chosen("2xA6000", "auto").architecture.tier == "8bit"
    assert chosen("2xA6000", "auto").warnings == ()
    given = tmp_path / "map.json"
    given.write_text('{"": 0}')
    plan = chosen("2xH100", "auto", str(given))
    assert plan.architecture.tier == "8bit"
    assert plan.warnings[0].startswith(
        "16bit does not fit with the given placement; --gpu-tier=16bit --gpu-placement=balanced"
    )


def test_where_balanced_has_no_max_memory() -> None:
    plan = chosen("4xH100", "4bit", "balanced")
    assert plan.fits
    assert plan.max_memory is None


def test_auto_that_fits_is_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("searched")

    monkeypatch.setattr(automap, "search_max_memory", fail)
    assert chosen("4xH100", "16bit").max_memory is None
    assert chosen("2xH100", "auto").max_memory is None
    # Nothing fits: nothing to come out as.
    assert chosen("1x24GiB", "16bit").max_memory is None
    assert chosen("1x24GiB", "16bit", "balanced").max_memory is None


def test_a_bitsandbytes_that_does_not_import_costs_the_line_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = chosen("2xL40S", "8bit", "balanced")

    def broken(*_: object, **__: object) -> None:
        raise LoadError("bitsandbytes cannot be imported")

    monkeypatch.setattr(automap, "search_max_memory", broken)
    assert chosen("2xL40S", "8bit", "balanced") == expected


def test_the_plan_on_the_terminal_and_in_the_report(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    result = pytester.runpytest(
        "--gpu-plan",
        "--gpu-simulate=1xH200",
        "--gpu-tier=16bit",
        "--gpu-placement=balanced",
        f"--gpu-report={tmp_path}",
    )
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            'auto places it like this with from_pretrained(..., device_map="auto", '
            'max_memory={0: "133GiB"})',
            "the plan fits",
        ],
        consecutive=True,
    )
    assert '"max_memory": {"0": "133GiB"}' in (tmp_path / "report.json").read_text()


def test_a_warm_plan_imports_neither_torch_nor_transformers() -> None:
    """Quick runs and --gpu-plan make it: with a max_memory, and where there is none."""
    chosen("4xH100", "16bit", "balanced")
    chosen("4xH100", "4bit", "balanced")
    chosen("1xH200", "16bit")
    code = (
        "import os, sys\n"
        "from pytest_multigpu.options import Settings\n"
        "from pytest_multigpu.planbook import PlanBook\n"
        "from pytest_multigpu.planning.simulate import simulate\n"
        "def chosen(spec, **asked):\n"
        "    return PlanBook(Settings(**asked), simulate(spec), os.environ).chosen\n"
        "assert chosen('4xH100', tier='16bit', placement='balanced').max_memory\n"
        "assert not chosen('4xH100', tier='4bit', placement='balanced').max_memory\n"
        "assert chosen('1xH200', tier='16bit').max_memory\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate', 'bitsandbytes'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_more_tokens_than_positions_are_nothing_to_rent_for() -> None:
    asked = Settings(tier="16bit", context=131_073)
    plan = PlanBook(asked, simulate("8xH100"), os.environ).chosen
    assert plan.reasons == (
        "llama-3.3-70b has 131072 positions (max_position_embeddings); "
        "131073 tokens were asked for",
    )
    assert plan.mendable
    assert plan.remedies == ("--gpu-context=131072 is the longest that fits as placed",)


def test_an_allocator_of_other_settings_is_not_accounted_for() -> None:
    machine = simulate("1xH100")
    environ = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    plan = PlanBook(Settings(tier="4bit"), machine, environ).chosen
    assert plan.fits
    warned = [r.reason for r in judge_plan(plan) if r.name == "not accounted for"]
    told = (
        "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64: peaks are predicted for torch's allocator "
        "as it is by default or with expandable_segments:True alone"
    )
    assert warned == [told]
    cpu = PlanBook(Settings(tier="cpu", model="tiny-llama"), machine, environ).chosen
    assert cpu.architecture.unknown == ()
