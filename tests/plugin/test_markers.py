"""The markers in somebody's own test file: skips that say need and found, errors at collection."""

from __future__ import annotations

import pytest

from pytest_multigpu import concern, plugin
from pytest_multigpu.machine import nvml
from pytest_multigpu.markers import wanted
from pytest_multigpu.records.machine import Gpu, Machine
from pytest_multigpu.units import GIB

ONE_H100 = Machine(
    gpus=(
        Gpu(
            index=0,
            cuda_index=0,
            uuid="GPU-0",
            name="NVIDIA H100 80GB HBM3",
            total_bytes=85_520_809_984,
            free_bytes=int(79.2 * GIB),
            capability=(9, 0),
            nvlinks=18,
        ),
    ),
    visible=(0,),
    driver="580.159.04",
    cuda="13.0",
)


@pytest.fixture
def one_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "read_machine", lambda environ: ONE_H100)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "read_machine", lambda environ: Machine())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(problem="the driver does not answer")
    monkeypatch.setattr(nvml, "read_machine", lambda environ: machine)


NEEDS_TWO = """
    import pytest

    @pytest.mark.gpu(count=2, vram="40GiB")
    def test_two():
        pass
"""


@pytest.mark.usefixtures("one_h100")
def test_skip_names_need_and_found(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(NEEDS_TWO)
    result = pytester.runpytest("-rs")
    text = "needs 2 GPUs with 40.0 GiB free each; found 1 (GPU 0: 79.2 GiB free)"
    result.assert_outcomes(skipped=1)
    assert f"test_skip_names_need_and_found.py:3: {text}" in result.stdout.str()
    assert result.ret == 0
    assert result.outlines[-1] == "NOT CHECKED: 1 skipped, no shipped check ran"


def test_skips_of_a_simulated_machine_stand_where_the_tests_do(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=f"{NEEDS_TWO}\n    def test_model(gpu_model): pass")
    result = pytester.runpytest("-rs", "--gpu-simulate=1x80GiB")
    for line in (3, 7):
        text = "simulated 1x80GiB: there is no GPU to run on"
        assert f"test_it.py:{line}: {text}" in result.stdout.str()


@pytest.mark.usefixtures("one_h100")
def test_met_requirement_runs(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(NEEDS_TWO.replace("count=2", "count=1"))
    pytester.runpytest().assert_outcomes(passed=1)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("args", [["--gpu-strict"], ["--gpu-tier=16bit"]])
def test_demanded_hardware_fails_with_exit_10(pytester: pytest.Pytester, args: list[str]) -> None:
    pytester.makepyfile(NEEDS_TWO)
    result = pytester.runpytest(*args)
    assert result.ret == 10
    assert result.outlines[-1].startswith(
        "NOT READY: needs 2 GPUs with 40.0 GiB free each; found no GPU"
    )


@pytest.mark.usefixtures("broken")
def test_a_detection_that_broke_never_skips(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(NEEDS_TWO)
    result = pytester.runpytest()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*the GPUs could not be asked: the driver does not answer*"])


def test_simulated_machines_run_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(NEEDS_TWO)
    result = pytester.runpytest("-rs", "--gpu-simulate=4xA6000")
    result.assert_outcomes(skipped=1)
    assert "simulated 4xA6000: there is no GPU to run on" in result.stdout.str()


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (
            'gpu(vrma="40GiB")',
            "gpu(vrma=): unknown argument; known: count, vram, total_vram, capability, nvlink",
        ),
        ('gpu(vram="40")', "gpu(vram=): '40' has no unit; write 40GiB or 40MiB"),
        ("gpu(vram=40)", 'gpu(vram=): 40 is not a size; write it like "40GiB"'),
        ("gpu(0)", "gpu(count=): 0 is not a number of GPUs; write 1 or more"),
        ("gpu(True)", "gpu(count=): True is not a number of GPUs; write 1 or more"),
        (
            "gpu(1, 2)",
            "gpu(): takes one positional argument, count; "
            "known: count, vram, total_vram, capability, nvlink",
        ),
        (
            'gpu(capability="Hopper")',
            "gpu(capability=): 'Hopper' is no compute capability; write it like \"8.0\"",
        ),
        (
            "gpu(capability=(8, -1))",
            'gpu(capability=): (8, -1) is no compute capability; write it like "8.0"',
        ),
        (
            'gpu(capability="1000.0")',
            "gpu(capability=): '1000.0' is no compute capability; write it like \"8.0\"",
        ),
        ("gpu(nvlink=1)", "gpu(nvlink=): 1 is neither True nor False"),
        ('gpu_tier("2bit")', "gpu_tier(): unknown tier '2bit'; known: 4bit, 8bit, 16bit"),
        ("gpu_tier()", 'gpu_tier(): takes exactly one argument, like "8bit"'),
        ("gpu_peak_limit(36)", 'gpu_peak_limit(): 36 is not a size; write it like "36GiB"'),
        ('gpu_leak_limit("64")', "gpu_leak_limit(): '64' has no unit; write 64GiB or 64MiB"),
        (
            'check(needs="luck")',
            "check(needs=): unknown need 'luck'; known: plan, host, machine, gpu, model",
        ),
        ('gpu\n@pytest.mark.quick("x")', "quick: takes no argument; write @pytest.mark.quick"),
    ],
)
def test_wrong_arguments_are_usage_errors_naming_the_test(
    pytester: pytest.Pytester, mark: str, message: str
) -> None:
    pytester.makepyfile(test_it=f"import pytest\n@pytest.mark.{mark}\ndef test_x(): pass")
    result = pytester.runpytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: test_it.py::test_x: {message}" in result.errlines


def test_several_gpu_marks_add_up(
    pytester: pytest.Pytester,
    one_h100: None,
) -> None:
    pytester.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.gpu(vram="80GiB")

        @pytest.mark.gpu(count=2)
        def test_both(): pass
        """
    )
    result = pytester.runpytest("-rs")
    assert "needs 2 GPUs with 80.0 GiB free each; found 0 (GPU 0: 79.2 GiB free)" in (
        result.stdout.str()
    )


def test_markers_are_documented(pytester: pytest.Pytester) -> None:
    text = pytester.runpytest("--markers").stdout.str()
    for name in ("quick", "gpu(count=1", "gpu_tier(", "gpu_peak_limit(", "gpu_leak_limit("):
        assert f"@pytest.mark.{name}" in text


def test_somebody_elses_quick_marker_is_left_alone(pytester: pytest.Pytester) -> None:
    """In a run that has nothing to do with GPUs the name may mean something else."""
    pytester.makepyfile("import pytest\n@pytest.mark.quick(5)\ndef test_x(): pass")
    pytester.runpytest().assert_outcomes(passed=1)


def test_every_fixture_makes_a_test_one_about_gpus() -> None:
    offered = {name for name in vars(plugin) if name.startswith("gpu_")}
    assert offered == concern.FIXTURES


def test_expected_failures_are_no_skips(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.xfail(reason="not yet")
        def test_fails_as_expected(): assert 0

        @pytest.mark.xfail(reason="not yet", strict=False)
        def test_passes_unexpectedly(): pass
        """
    )
    pytester.path.joinpath("skips.txt").write_text("")
    result = pytester.runpytest("--gpu-expected-skips=skips.txt")
    result.assert_outcomes(xfailed=1, xpassed=1)
    assert result.ret == 0
    assert result.outlines[-1] == "NOT CHECKED: 2 own tests passed, no shipped check ran"


def test_what_xfail_does_not_run_is_a_skip(pytester: pytest.Pytester) -> None:
    source = '@pytest.mark.xfail(run=False, reason="it hangs")\ndef test_x(): pass'
    pytester.makepyfile(test_own=f"import pytest\n{source}")
    pytester.path.joinpath("skips.txt").write_text("")
    result = pytester.runpytest("--gpu-expected-skips=skips.txt")
    result.assert_outcomes(xfailed=1)
    assert result.ret == 1
    assert result.outlines[-1] == (
        "NOT READY: test_own.py::test_x was skipped and skips.txt does not list it: it hangs; "
        "make it run, or add it to the file"
    )


@pytest.mark.skipif(int(pytest.__version__.split(".")[0]) < 9, reason="subtests came with it")
def test_a_skipped_subtest_skips_no_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        def test_x(subtests, gpu_settings):
            for i in range(2):
                with subtests.test(i=i):
                    if i:
                        pytest.skip("one of two")
    """)
    pytester.path.joinpath("skips.txt").write_text("")
    result = pytester.runpytest("--gpu-tier=cpu", "--gpu-expected-skips=skips.txt")
    assert result.ret == 0
    assert "1 own test passed" in result.outlines[-1]


def test_a_strict_xfail_that_passes_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.xfail(strict=True)\ndef test_x(): pass")
    result = pytester.runpytest("--gpu-tier=cpu")
    assert result.ret == 1
    assert "[XPASS(strict)]" in result.outlines[-1]


def test_an_expected_failure_hides_no_failed_record(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from pytest_multigpu.records.check import Record

        @pytest.mark.xfail
        @pytest.mark.check(needs="host")
        def test_it():
            return Record(name="a thing", outcome="failed", reason="it is broken")
        """
    )
    result = pytester.runpytest("--gpu-tier=cpu")
    result.assert_outcomes(xfailed=1)
    assert result.ret == 1
    assert result.outlines[-1].startswith("NOT READY: it is broken")


def test_a_run_is_ours_while_nobody_elses_test_is_in_it(pytester: pytest.Pytester) -> None:
    items = pytester.getitems(
        """
        import pytest

        @pytest.mark.check(needs="model")
        def test_check(gpu_model):
            pass

        def test_of_a_game(gpu_model):
            pass
        """
    )
    assert [wanted(some).ours for some in (items[:1], items[1:], items)] == [True, False, False]


@pytest.mark.parametrize("how", ["trylast=True", "wrapper=True"])
def test_marks_that_are_added_last_count(pytester: pytest.Pytester, how: str) -> None:
    wait = "yield" if how == "wrapper=True" else "pass"
    pytester.makeconftest(f"""
        import pytest

        @pytest.hookimpl({how})
        def pytest_collection_modifyitems(items):
            {wait}
            for item in items:
                item.add_marker(pytest.mark.gpu(count=4))
    """)
    pytester.makepyfile("def test_x(): assert 0")
    result = pytester.runpytest_subprocess("--gpu-simulate=2x80GiB")
    result.assert_outcomes(skipped=1)
    plain = pytester.runpytest_subprocess()
    assert plain.ret != 1
    plain.assert_outcomes(skipped=1)
