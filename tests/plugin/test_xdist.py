"""xdist: each worker on its own GPU inside the mask, one worker for the model, one set of tables.

The GPUs are fakes (``-p fake_machine``); the processes, the locks and the kills are real.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from xdist_rows import Row, assert_one_process_at_a_time, rows

pytest.importorskip("xdist")

SUPPORT = Path(__file__).parents[1] / "support"

RECORDER = """
    import json, os, time
    import pytest
    from pathlib import Path

    @pytest.fixture(autouse=True)
    def _record(request):
        row = {"test": request.node.name, "start": time.time()}
        row["worker"], row["pid"] = os.environ.get("PYTEST_XDIST_WORKER"), os.getpid()
        yield
        row["mask"], row["end"] = os.environ.get("CUDA_VISIBLE_DEVICES"), time.time()
        with open("rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\\n")
"""


@pytest.fixture
def fakes(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six fake GPUs of which the caller's mask shows four; locks of this test's own."""
    monkeypatch.setenv("PYTHONPATH", f"{SUPPORT}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_GPUS", "6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,4,5")
    monkeypatch.setenv("TMPDIR", str(pytester.path))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makeconftest(RECORDER)


MASK = {f"GPU-{n:08x}-0000-4000-8000-{n:012x}" for n in (1, 2, 4, 5)}


def distribute(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "fake_machine", *args, timeout=120)


def same_mask(one: Row, other: Row) -> bool:
    return bool(one["mask"] == other["mask"])


@pytest.mark.usefixtures("fakes")
def test_four_workers_on_four_gpus_and_one_of_them_killed(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os, pytest, signal, time
        from pathlib import Path

        @pytest.mark.gpu(count=1)
        @pytest.mark.parametrize("number", range(8))
        def test_together(number, gpu_inventory):
            Path("here-" + os.environ["PYTEST_XDIST_WORKER"]).touch()
            deadline = time.monotonic() + 30
            while len(list(Path().glob("here-*"))) < 4:  # until all four are at work
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert len(gpu_inventory.visible) == 1

        @pytest.mark.gpu
        @pytest.mark.parametrize("number", range(8))
        def test_after(number):
            if number == 2:
                with open("killed", "a") as file:
                    file.write(os.environ["CUDA_VISIBLE_DEVICES"] + "\\\\n")
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    result = distribute(pytester, "-n4", "--maxschedchunk=1")
    found = rows()
    together = [row for row in found if row["test"].startswith("test_together")]
    assert {row["mask"] for row in together} == MASK
    assert {row["mask"] for row in found} == MASK
    assert_one_process_at_a_time(found, same_mask)
    assert len({row["pid"] for row in together}) == 4
    # Everything else has run, once; what killed its worker was not tried again.
    assert len({row["test"] for row in found}) == len(found) == 15
    assert len(Path("killed").read_text().split()) == 1
    assert result.ret == 1
    assert result.outlines[-1].startswith("NOT READY: ")
    assert "crashed while running" in result.outlines[-1]
    assert sum("READY: " in line for line in result.outlines) == 1


@pytest.mark.usefixtures("fakes")
def test_eight_workers_on_four_gpus_wait_and_finish(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest, time

        @pytest.mark.gpu
        @pytest.mark.parametrize("number", range(16))
        def test_one(number):
            time.sleep(0.1)

        @pytest.mark.gpu(count=4)
        @pytest.mark.parametrize("number", range(2))
        def test_all(number, gpu_inventory):
            assert gpu_inventory.visible == (1, 2, 4, 5)
            assert not any(gpu.problem for gpu in gpu_inventory.gpus)
        """
    )
    result = distribute(pytester, "-n8", "--gpu-report=out")
    result.assert_outcomes(passed=18)
    found = rows()
    one = [row for row in found if row["test"].startswith("test_one")]
    whole = [row for row in found if row["test"].startswith("test_all")]
    assert {row["mask"] for row in one} <= MASK
    assert_one_process_at_a_time(one, same_mask)
    assert {row["mask"] for row in whole} == {"1,2,4,5"}
    assert len({row["worker"] for row in whole}) == 1
    for row in whole:  # nobody else on any GPU meanwhile
        others = [other for other in one if other["pid"] != row["pid"]]
        assert all(o["end"] <= row["start"] or row["end"] <= o["start"] for o in others)
    report = json.loads(Path("out/report.json").read_text())
    assert report["machine"]["visible"] == [1, 2, 4, 5]
    assert sorted(check["nodeid"] for check in report["checks"])[0].endswith("test_all[0]")
    assert report["running"] is None
    assert result.outlines[-1] == "NOT CHECKED: 18 own tests passed, no shipped check ran"


@pytest.mark.usefixtures("fakes")
def test_cuda_started_too_early_is_one_clear_failure(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        import pytest_multigpu.parallel.worker as worker
        worker.driver_started = lambda: True  # as after torch.cuda.get_device_capability()

        @pytest.mark.gpu
        def test_it():
            pass
        """
    )
    result = distribute(pytester, "-n1")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "*CUDA was started in worker gw0 before its GPU was chosen: start it in fixtures or "
            "tests, not when a module is imported or collected"
        ]
    )


@pytest.mark.usefixtures("fakes")
def test_a_run_about_something_else_is_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_it(number):
            pass
        """
    )
    result = distribute(pytester, "-n2", "-v")
    result.assert_outcomes(passed=6)
    assert "READY" not in result.stdout.str()
    assert {row["mask"] for row in rows()} == {"1,2,4,5"}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(("tier", "goes_on"), [(["--gpu-tier=cpu"], True), ([], False)])
def test_who_ran_what_needs_the_machine_goes_on_where_no_gpu_is_taken(
    pytester: pytest.Pytester, tier: list[str], goes_on: bool
) -> None:
    pytester.makepyfile(
        """
        import time, pytest

        from pytest_multigpu.records.check import Record

        @pytest.mark.check(needs="plan")
        @pytest.mark.parametrize("number", range(4))
        def test_machine(number):
            return Record(name="a thing", outcome="passed")

        @pytest.mark.parametrize("number", range(40))
        def test_other(number):
            time.sleep(0.05)
        """
    )
    result = distribute(pytester, "-n2", *tier)
    result.assert_outcomes(passed=44)
    ran = rows()
    (whole,) = {row["worker"] for row in ran if row["test"].startswith("test_machine")}
    others = [row["worker"] for row in ran if row["test"].startswith("test_other")]
    assert (whole in others) is goes_on
    assert len(set(others)) == 1 + goes_on


@pytest.mark.usefixtures("fakes")
def test_a_fleet_has_one_table(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makepyfile(
        """
        import os, pytest
        from pytest_multigpu.records.check import Record

        @pytest.mark.quick
        @pytest.mark.check(needs="machine")
        def test_gpus(gpu_inventory):
            bad = "pod-b" in os.environ["PYTEST_XDIST_WORKER"]
            return Record(name="GPUs", outcome="failed" if bad else "passed", measured=4,
                          reason="GPU 3 is lost" if bad else "", remedy="rent another")
        """
    )
    tx = [part for name in ("pod-a", "pod-b", "pod-c") for part in ("--tx", f"popen//id={name}")]
    args = ("--dist=each", *tx, "-m", "quick", "--gpu-report=out", "-p", "no:terminalprogress")
    result = distribute(pytester, *args)
    assert result.ret == 1
    lines = [line.split() for line in result.outlines[-5:]]
    assert lines[0] == ["machine", "GPUs", "passed", "failed", "verdict"]
    assert [line[0] for line in lines[1:4]] == ["pod-a", "pod-b", "pod-c"]
    assert lines[1][2:] == ["4", "x", "NVIDIA", "H100", "80GB", "HBM3", "1", "0", "READY"]
    assert lines[2][8:12] == ["0", "1", "NOT", "READY:"]
    assert result.outlines[-1].startswith("NOT READY: 1 of 3 machines: pod-b (")
    assert result.outlines[-1].endswith("): GPU 3 is lost; rent another")
    assert sum("READY: 1 check passed" in line for line in result.outlines) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["verdict"] == "NOT READY"
    assert [pod["name"] for pod in report["pods"]] == ["pod-a", "pod-b", "pod-c"]
    assert [pod["verdict"] for pod in report["pods"]] == ["READY", "NOT READY", "READY"]
    assert [len(pod["checks"]) for pod in report["pods"]] == [1, 1, 1]


WRONG_MARK = """
    import pytest

    @pytest.mark.gpu(vram="40")
    def test_x():
        pass

    def test_other():
        pass
"""
WRONG_MARK_SAYS = "test_wrong.py::test_x: gpu(vram=): '40' has no unit; write 40GiB or 40MiB"
CHECK = """
    import pytest
    from pytest_multigpu.records.check import Record

    @pytest.mark.check(needs="plan")
    def test_it(gpu_plan):
        return Record(name="a thing", outcome="passed")
"""


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("source", "args", "message"),
    [
        (WRONG_MARK, ["-n2"], WRONG_MARK_SAYS),
        (WRONG_MARK, ["--dist=each", "--tx=popen//id=pod"], f"pod: {WRONG_MARK_SAYS}"),
        (CHECK, ["-n2", "--gpu-model=nosuch"], "--gpu-model: "),
        (CHECK, ["-n2", "--gpu-tier=6bit"], "--gpu-tier: unknown tier '6bit'; known: "),
    ],
)
def test_usage_errors_are_one_line_here_too(
    pytester: pytest.Pytester, source: str, args: list[str], message: str
) -> None:
    pytester.makepyfile(test_wrong=source)
    result = distribute(pytester, *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    errors = [line for line in result.errlines if line]
    assert len(errors) == 1
    assert errors[0].startswith(f"ERROR: {message}")
    assert "INTERNALERROR" not in result.stdout.str()
    assert "READY" not in result.stdout.str()


@pytest.mark.parametrize("dist", ["load", "loadfile"])
def test_a_path_that_is_not_there_ends_as_without_the_plugin(
    pytester: pytest.Pytester, dist: str
) -> None:
    """Each worker is gone as soon as it has said that it found nothing."""
    pytester.makepyfile(test_x="def test_x(): pass")
    result = pytester.runpytest_subprocess("-n2", f"--dist={dist}", "test_x.py", "not_there.py")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()


@pytest.mark.parametrize("dist", ["loadfile", "each"])
def test_without_workers_nothing_is_distributed(pytester: pytest.Pytester, dist: str) -> None:
    """``addopts = --dist=loadfile`` in an ini file, and no ``-n``."""
    pytester.makepyfile("def test_x(gpu_settings): pass")
    result = pytester.runpytest_subprocess(f"--dist={dist}", "--gpu-tier=cpu")
    result.assert_outcomes(passed=1)
    assert result.ret == 0
    assert "INTERNALERROR" not in result.stdout.str()


def test_an_ini_file_that_cannot_be_does_not_break_other_runs(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ngpu_config = game.json\n")
    Path("game.json").write_text("{")
    pytester.makepyfile(test_x="def test_x(): pass")
    pytester.runpytest_subprocess("-n2").assert_outcomes(passed=1)
    pytester.makepyfile(test_wrong=CHECK)
    result = pytester.runpytest_subprocess("-n2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert any(line.startswith(f"ERROR: {pytester.path}/game.json: ") for line in result.errlines)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("gpus", "says"),
    [
        ("0", "NOT READY: this machine has no NVIDIA GPU; rent a machine with GPUs"),
        ("1", r"NOT READY: \d+ blocks would go to the CPU: model\.layers\."),
    ],
)
def test_a_verdict_rests_on_machine_and_plan_here_too(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, gpus: str, says: str
) -> None:
    monkeypatch.setenv("FAKE_GPUS", gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pytester.makepyfile(CHECK.replace("(gpu_plan)", "()").replace('"plan"', '"host"'))
    result = distribute(pytester, "-n2", "--gpu-tier=16bit")
    result.assert_outcomes(passed=1)
    assert result.ret == 10
    assert re.match(says, result.outlines[-1])
