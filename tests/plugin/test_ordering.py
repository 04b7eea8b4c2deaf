"""The order of the shipped checks: nothing waits that need not."""

from __future__ import annotations

import pytest


def test_what_waits_for_the_worker_comes_last_among_the_quick(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess(
        "--gpu-tier=cpu", "--collect-only", "-q", "-p", "no:randomly",
        "--pyargs", "pytest_multigpu.checks",
    )  # fmt: skip
    names = [line.rpartition("::")[2] for line in result.outlines if "::" in line]
    quick = names[: names.index("test_parameters_lie_where_planned")]
    waiting = ["test_driver", "test_visibility", "test_health"]
    assert quick.index("test_room_for_the_context") < quick.index("test_driver")
    assert quick.index("test_free_vram") < quick.index("test_the_model_fits")
    assert [name for name in quick if name in waiting] == waiting
    assert quick[-1] == "test_speed_under_load"
    assert names.index("test_peaks") == len(names) - 1


WARNS = """
    import warnings
    import pytest
    from pytest_multigpu.records.check import Record

    def warn():
        # As a library does of its caller: attributed to whoever called it.
        warnings.warn("dropped in the next version", FutureWarning, stacklevel=2)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        warnings.warn("slow", UserWarning, stacklevel=2)

    @pytest.mark.check(needs="host")
    def test_check():
        warn()
        return Record(name="a thing", outcome="passed")

    def test_own():
        warn()
"""


@pytest.mark.parametrize("how", ["option", "ini"])
def test_warnings_of_libraries_fail_no_check_whatever_the_project_filters(
    pytester: pytest.Pytester, how: str
) -> None:
    if how == "ini":
        pytester.makeini("[pytest]\nfilterwarnings = error\n")
    pytester.makepyfile(WARNS)
    args = ["-W", "error"] if how == "option" else []
    # In a process of its own: pytest warns of plugins that are imported already.
    result = pytester.runpytest_subprocess("--gpu-tier=cpu", *args)
    result.assert_outcomes(passed=1, failed=1)  # the project's own test fails as it wants
    assert "test_own failed: FutureWarning: dropped in the next version" in result.outlines[-1]


def test_a_thread_that_dies_in_a_check_stays_with_the_projects_filters(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import threading
        import pytest
        from pytest_multigpu.records.check import Record

        @pytest.mark.check(needs="host")
        def test_check():
            thread = threading.Thread(target=lambda: 1 / 0)
            thread.start()
            thread.join()
            return Record(name="a thing", outcome="passed")
        """
    )
    result = pytester.runpytest_subprocess("--gpu-tier=cpu", "-W", "error")
    assert result.ret == 1
    assert "PytestUnhandledThreadExceptionWarning" in result.stdout.str()


def test_stepwise_goes_by_the_order_of_the_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What loads the model comes last, wherever it stands: it did not run, and is not passed."""
    pytester.makepyfile("""
        import os

        def test_late(gpu_model):
            assert 0

        def test_early(gpu_settings):
            assert "OK" in os.environ
    """)
    args = ("--gpu-tier=cpu", "--sw", "-p", "no:randomly")
    monkeypatch.delenv("PYTEST_ADDOPTS")  # it is about pytest's cache
    pytester.runpytest_subprocess(*args).assert_outcomes(failed=1)
    monkeypatch.setenv("OK", "1")
    pytester.runpytest_subprocess(*args).assert_outcomes(passed=1, failed=1)


def test_checks_run_where_warnings_are_not_filtered(pytester: pytest.Pytester) -> None:
    """The mark that filters them is then unknown."""
    pytester.makepyfile(WARNS)
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:warnings\n")
    pytester.runpytest_subprocess("--gpu-tier=cpu").assert_outcomes(passed=2)
