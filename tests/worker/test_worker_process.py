"""The worker as a process: it comes through, dies, hangs, and never outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.errors import MachineError
from pytest_multigpu.judging import arithmetic, interconnect
from pytest_multigpu.judging.worker import worker_came_through
from pytest_multigpu.machine.worker import COMMAND, WorkerHandle, start_worker

ROOT = Path(__file__).parents[2]
SMALL = ("--load-seconds=0.005", "--memory-bytes=65536")
COPY_BYTES = 65536


def start_faulty(command: tuple[str, ...], fault: Mapping[str, Any], **more: Any) -> WorkerHandle:
    return start_worker(
        copy_bytes=COPY_BYTES,
        devices="cpu,cpu,cpu",
        command=command,
        arguments=(*SMALL, f"--fault={json.dumps(fault)}"),
        **more,
    )


def test_all_steps_come_through_on_stand_ins() -> None:
    seen: list[str] = []
    handle = start_worker(
        copy_bytes=COPY_BYTES,
        devices="cpu,cpu,cpu",
        arguments=SMALL,
        timeout_s=60,
        on_event=lambda event: seen.append(event["event"]),
    )
    report = handle.result()
    assert report.failure is None
    assert report.unmeasured == ()
    assert [device.index for device in report.devices] == [0, 1, 2]
    assert {(pair.source, pair.target) for pair in report.pairs} == {
        (source, target) for source in range(3) for target in range(3) if source != target
    }
    assert all(pair.bytes == COPY_BYTES and not pair.differing_bytes for pair in report.pairs)
    assert all(pair.gb_per_s and pair.gb_per_s > 0 for pair in report.pairs)
    assert len(report.chains) == 8
    assert not any(chain.differing_bytes for chain in report.chains)
    assert {(product.gpu, product.dtype) for product in report.products} == {
        (gpu, dtype) for gpu in range(3) for dtype in ("bfloat16", "float32")
    }
    assert len({product.checksum for product in report.products if product.dtype == "float32"}) == 1
    assert all(speed.memory_gb_per_s and speed.tflop_per_s for speed in report.speeds)
    assert all(upload.equal and upload.gb_per_s for upload in report.uploads)
    assert all(step.seconds is not None for step in report.steps)
    assert report.steps[0].started > time.time() - 60
    assert seen[0] == "start"
    assert seen[-1] == "done"
    assert handle.result() is report


@pytest.mark.parametrize(
    ("fault", "failure", "gpus"),
    [
        (
            {"kind": "kill", "at": "copy_into", "gpus": [1, 2]},
            "the CUDA worker died (SIGKILL) at step 'copies' on GPU 1 -> GPU 2",
            (1, 2),
        ),
        (
            {"kind": "raise", "at": "open", "gpus": [2]},
            "the CUDA worker failed at step 'contexts' on GPU 2: "
            "RuntimeError: CUDA error: an illegal memory access was encountered",
            (2,),
        ),
    ],
)
def test_its_end_names_step_and_gpus(
    faulty_command: tuple[str, ...], fault: dict[str, Any], failure: str, gpus: tuple[int, ...]
) -> None:
    report = start_faulty(faulty_command, fault, timeout_s=60).result()
    assert report.failure == failure
    assert report.failed_gpus == gpus
    if gpus == (1, 2):
        # What arrived before is kept: 0-1, 0-2, 1-0.
        assert [(pair.source, pair.target) for pair in report.pairs] == [(0, 1), (0, 2), (1, 0)]
    step = report.step("copies" if gpus == (1, 2) else "contexts")
    assert step is not None
    assert step.seconds is None


def test_a_gpu_short_of_memory_is_left_out_alone(faulty_command: tuple[str, ...]) -> None:
    report = start_faulty(faulty_command, {"kind": "full", "gpu": 1}, timeout_s=60).result()
    assert report.failure is None
    assert [(entry.step, entry.gpus) for entry in report.unmeasured] == [("devices", (1,))]
    assert report.unmeasured[0].reason.startswith("GPU 1 has 1 MiB free; copies and arithmetic")
    assert [device.index for device in report.devices] == [0, 1, 2]
    assert [(pair.source, pair.target) for pair in report.pairs] == [(0, 2), (2, 0)]
    assert all(pair.gb_per_s for pair in report.pairs)
    assert {chain.order for chain in report.chains} == {(0, 2, 0), (2, 0, 2)}
    assert {upload.gpu for upload in report.uploads} == {0, 2}
    assert {product.gpu for product in report.products} == {0, 2}
    assert {speed.gpu for speed in report.speeds} == {0, 2}
    assert all(speed.memory_gb_per_s and speed.tflop_per_s for speed in report.speeds)
    # What is missing is unknown by the GPU's name, in each check; the others are judged.
    for judge in (
        *(interconnect.uploads, interconnect.copies, interconnect.chains),
        *(interconnect.pair_bandwidths, arithmetic.products, arithmetic.memory_bandwidths),
        *(arithmetic.product_speeds, arithmetic.host_bandwidths),
    ):
        records = judge(report)
        unknown = [record for record in records if record.outcome == "unknown"]
        assert {record.device for record in unknown} == {"GPU 1"}
        assert len(records) > len(unknown)


def test_all_short_of_memory_measures_nothing(faulty_command: tuple[str, ...]) -> None:
    handle = start_worker(
        copy_bytes=COPY_BYTES,
        devices="cpu",
        command=faulty_command,
        arguments=(*SMALL, '--fault={"kind": "full", "gpu": 0}'),
    )
    report = handle.result()
    assert report.failure is None
    assert not report.uploads
    assert not report.speeds
    assert report.step("uploads") is None


SHADOW = "raise ImportError('random is my own')\n"


def test_files_of_the_current_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random", "torch", "json", "pytest_multigpu"):
        (tmp_path / f"{name}.py").write_text(SHADOW)
    monkeypatch.chdir(tmp_path)
    report = start_worker(devices="cpu,cpu", copy_bytes=4096, arguments=SMALL).result()
    assert report.failure is None


def test_pythonpath_counts_and_what_shadows_a_module_there_is_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text(SHADOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = start_worker(devices="cpu", copy_bytes=4096, arguments=SMALL).result()
    assert report.failure == (
        "the CUDA worker failed at step 'import torch': ImportError: random is my own"
    )
    assert worker_came_through(report).remedy == (
        "`python -c 'import torch'` in an empty folder must work: if it does not, reinstall "
        "torch; if it does, look for files on PYTHONPATH that are named like modules of Python or "
        "torch"
    )


def test_the_package_is_the_parents_own() -> None:
    """Isolated and without site-packages there is neither torch nor this package to find."""
    python, *rest = COMMAND
    report = start_worker(command=(python, "-I", "-S", *rest), devices="cpu").result()
    assert report.failure == (
        "the CUDA worker failed at step 'import torch': "
        "ModuleNotFoundError: No module named 'torch'"
    )


def test_a_hang_is_ended_within_its_limit() -> None:
    # A main without torch, so that the limit can be short.
    main = """
import json, time
print(json.dumps({"event": "start", "step": "copies", "gpus": [0, 1], "at": 1.0}))
print(json.dumps({"event": "at", "step": "copies", "gpus": [1, 0], "path": True}), flush=True)
time.sleep(600)
"""
    handle = start_worker(command=(sys.executable, "-c", main), timeout_s=1.5)
    began = time.monotonic()
    report = handle.result()
    assert 1.0 < time.monotonic() - began < 4
    assert report.failure == (
        "the CUDA worker hung at step 'copies' on GPU 1 -> GPU 0; killed after 1.5 s"
    )
    with pytest.raises(ProcessLookupError):
        os.kill(handle.pid, 0)


def test_close_ends_it_at_once(faulty_command: tuple[str, ...]) -> None:
    handle = start_faulty(faulty_command, {"kind": "hang", "at": "open", "gpus": [1]})
    handle.close()
    failure = handle.result().failure
    assert failure is not None
    assert failure.startswith("the CUDA worker was ended ")
    assert failure.endswith(" before it was through")
    with pytest.raises(ProcessLookupError):
        os.kill(handle.pid, 0)


def test_a_main_that_says_nothing_is_a_failure_with_its_last_line() -> None:
    handle = start_worker(
        command=(sys.executable, "-c", "import sys; sys.exit('no module named torch')")
    )
    assert handle.result().failure == (
        "the CUDA worker died (exit code 1) after step 'start': no module named torch"
    )


def test_ending_well_without_having_done_all_is_a_failure() -> None:
    handle = start_worker(command=(sys.executable, "-c", "print('[1]'); print('hello')"))
    assert handle.result().failure == (
        "the CUDA worker died (exit code 0) after step 'start': hello"
    )


def test_a_listener_that_raises_does_not_stop_the_reading() -> None:
    lines = '{"event": "done"}'

    def listen(event: Mapping[str, Any]) -> None:
        raise RuntimeError("of its own")

    handle = start_worker(command=(sys.executable, "-c", f"print('{lines}')"), on_event=listen)
    assert handle.result().failure is None
    assert str(handle.listener_error) == "of its own"


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(MachineError, match="the CUDA worker could not be started"):
        start_worker(command=("/nowhere/python",))


@pytest.mark.parametrize("size", [0, 4095, 4097, 4080])
def test_copy_bytes_must_be_whole(size: int) -> None:
    with pytest.raises(ValueError, match="it must be a multiple of 16, at least 4096"):
        start_worker(copy_bytes=size)


def test_it_ends_with_its_parent_which_never_imports_torch(tmp_path: Path) -> None:
    parent = tmp_path / "parent.py"
    faulty = ROOT / "tests" / "support" / "faulty_worker.py"
    parent.write_text(
        f"""
import json, os, signal, sys, threading
from pytest_multigpu.machine.worker import start_worker
hanging = threading.Event()
def listen(event):
    if event["event"] == "start" and event["step"] == "contexts":
        hanging.set()
fault = {{"kind": "hang", "at": "open", "gpus": [0]}}
handle = start_worker(devices="cpu,cpu", copy_bytes=4096, on_event=listen,
    command=(sys.executable, "-u", {str(faulty)!r}), arguments=("--fault=" + json.dumps(fault),))
assert hanging.wait(60)
print(handle.pid, "torch" in sys.modules, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
""",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(parent)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, torch_imported = done.stdout.split()
    assert torch_imported == "False"
    until = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and _running(int(pid)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _running(int(pid))


def _running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody reaps."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
