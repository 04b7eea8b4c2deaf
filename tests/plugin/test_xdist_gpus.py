"""xdist on real GPUs: each worker computes on its own GPU, inside the caller's mask.

What ``test_xdist.py`` shows with fakes; here torch says which GPU it was.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from xdist_rows import Row, assert_one_process_at_a_time, rows

from pytest_multigpu.records.machine import Machine

pytest.importorskip("xdist")
pytestmark = pytest.mark.gpu(count=4)

RECORDER = """
    import json, os, time
    import pytest

    @pytest.fixture(autouse=True)
    def _record(request):
        import torch
        row = {"test": request.node.name, "start": time.time(), "pid": os.getpid()}
        torch.ones(1 << 20, device="cuda").sum().item()
        row["gpus"] = [str(torch.cuda.get_device_properties(i).uuid)
                       for i in range(torch.cuda.device_count())]
        yield
        row["end"] = time.time()
        with open("rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\\n")
"""


@pytest.fixture
def four(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, gpu_inventory: Machine
) -> list[str]:
    """UUIDs of the first four visible GPUs, which the runs within see."""
    uuids = [gpu.uuid for gpu in gpu_inventory.visible_gpus[:4]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(uuids))
    monkeypatch.setenv("TMPDIR", str(pytester.path))  # locks of this test's own
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makeconftest(RECORDER)
    return [uuid.removeprefix("GPU-") for uuid in uuids]


def common_gpu(one: Row, other: Row) -> bool:
    return bool(set(one["gpus"]) & set(other["gpus"]))


def test_four_workers_and_one_of_them_killed(pytester: pytest.Pytester, four: list[str]) -> None:
    pytester.makepyfile(
        """
        import os, pytest, signal, time
        from pathlib import Path

        @pytest.mark.gpu
        @pytest.mark.parametrize("number", range(8))
        def test_together(number):
            Path("here-" + os.environ["PYTEST_XDIST_WORKER"]).touch()
            deadline = time.monotonic() + 60
            while len(list(Path().glob("here-*"))) < 4:  # until all four are at work
                assert time.monotonic() < deadline
                time.sleep(0.02)

        @pytest.mark.gpu
        @pytest.mark.parametrize("number", range(8))
        def test_after(number):
            if number == 2:
                Path("killed").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    result = pytester.runpytest_subprocess("-n4", "--maxschedchunk=1", timeout=240)
    found = rows()
    assert all(len(row["gpus"]) == 1 for row in found)
    together = [row for row in found if row["test"].startswith("test_together")]
    assert sorted({row["gpus"][0] for row in together}) == sorted(four)
    assert len({row["pid"] for row in together}) == 4
    assert {row["gpus"][0] for row in found} == set(four)
    assert_one_process_at_a_time(found, common_gpu)
    # Everything else has run, once.
    assert len({row["test"] for row in found}) == len(found) == 15
    assert Path("killed").read_text().removeprefix("GPU-") in four
    assert result.ret == 1
    assert "crashed while running" in result.outlines[-1]


def test_eight_workers_on_four_gpus_wait_and_finish(
    pytester: pytest.Pytester, four: list[str]
) -> None:
    pytester.makepyfile(
        """
        import pytest, time

        @pytest.mark.gpu
        @pytest.mark.parametrize("number", range(16))
        def test_one(number):
            time.sleep(0.1)

        @pytest.mark.gpu(count=4)
        def test_all():
            import torch
            assert torch.cuda.device_count() == 4
        """
    )
    result = pytester.runpytest_subprocess("-n8", timeout=240)
    result.assert_outcomes(passed=17)
    found = rows()
    one = [row for row in found if row["test"].startswith("test_one")]
    whole = [row for row in found if row["test"].startswith("test_all")]
    assert all(len(row["gpus"]) == 1 for row in one)
    assert {row["gpus"][0] for row in one} <= set(four)
    assert [row["gpus"] for row in whole] == [four]
    assert_one_process_at_a_time(found, common_gpu)


def test_none_leaves_the_callers_mask(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, four: list[str]
) -> None:
    before = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join([before[3], before[1]]))
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        @pytest.mark.parametrize("number", range(6))
        def test_one(number):
            pass
        """
    )
    pytester.runpytest_subprocess("-n4", timeout=240).assert_outcomes(passed=6)
    found = rows()
    assert {row["gpus"][0] for row in found} <= {four[3], four[1]}
    assert_one_process_at_a_time(found, common_gpu)
