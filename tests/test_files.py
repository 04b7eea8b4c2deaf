"""A named pipe, a socket or a device in a file's place: one clear error, and nobody waits."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.closing import read_expected_skips
from pytest_multigpu.errors import MultiGpuError
from pytest_multigpu.files import check_regular, read_bytes, read_text
from pytest_multigpu.game_config import read_game_config
from pytest_multigpu.given_files import read_catalogue, read_json
from pytest_multigpu.machine.checkpoint import check_checkpoint
from pytest_multigpu.model.config import resolve_config
from pytest_multigpu.model.fingerprint import fingerprint
from pytest_multigpu.model.safetensors_index import checkpoint_files, read_headers
from pytest_multigpu.probes.formats import load_probe
from pytest_multigpu.report.baseline import read_baselines
from pytest_multigpu.report.drift import read_drift

PIPE = "it is a named pipe, not a regular file"


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """Opening a pipe that nobody writes to waits for ever."""

    def late(*_: Any) -> None:
        raise TimeoutError("it waited for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "file.json"
    os.mkfifo(path)
    return path


READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "device map": (
        lambda p: read_json(p, "--gpu-placement"),
        "--gpu-placement: {}: cannot be read: " + PIPE,
    ),
    "catalogue": (read_catalogue, "--gpu-catalogue: {}: cannot be read: " + PIPE),
    "game config": (read_game_config, "{}: cannot be read: " + PIPE),
    "expected skips": (read_expected_skips, "--gpu-expected-skips: {}: cannot be read: " + PIPE),
    "baselines": (read_baselines, f"{{}}: cannot be read ({PIPE}); name another file"),
    "drift": (
        read_drift,
        f"{{}}: cannot be read ({PIPE}); repair it, move it away, or name another --gpu-report "
        "folder",
    ),
    "probe": (load_probe, "{}: cannot be read: " + PIPE),
    "shard": (lambda p: read_headers([p]), "{}: cannot be read: " + PIPE),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_named_pipe_is_one_error(pipe: Path, reader: str) -> None:
    read, text = READERS[reader]
    with pytest.raises(MultiGpuError) as error:
        read(pipe)
    assert str(error.value) == text.format(pipe)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "probe.safetensors"])
def test_a_named_pipe_in_a_folder_is_one_problem(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    problems = check_checkpoint(tmp_path).problems
    if name == "probe.safetensors":
        with pytest.raises(MultiGpuError, match="holds neither"):
            load_probe(tmp_path)
    else:
        assert f"{tmp_path / name} cannot be read ({PIPE})" in problems


def test_a_named_pipe_among_the_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors"}}')
    os.mkfifo(tmp_path / "one.safetensors")
    assert check_checkpoint(tmp_path).problems == (
        f"{tmp_path / 'one.safetensors'} cannot be read ({PIPE})",
    )
    with pytest.raises(MultiGpuError, match=r"1 of 1 shards missing, first one\.safetensors"):
        checkpoint_files(tmp_path)
    index.unlink()
    os.mkfifo(index)
    assert check_checkpoint(tmp_path).problems == (f"{index} cannot be read ({PIPE})",)
    os.mkfifo(tmp_path / "pytorch_model.bin")
    with pytest.raises(MultiGpuError) as error:
        fingerprint(tmp_path)
    assert str(error.value) == f"{tmp_path / 'pytorch_model.bin'}: cannot be read: {PIPE}"


def test_a_model_that_is_a_named_pipe(pipe: Path) -> None:
    with pytest.raises(MultiGpuError, match=r"has no config\.json"):
        resolve_config(str(pipe))


@pytest.mark.parametrize(
    "option",
    ["--gpu-probe", "--gpu-config", "--gpu-catalogue", "--gpu-expected-skips", "--gpu-baseline"],
)
def test_options_that_name_a_named_pipe(pytester: pytest.Pytester, pipe: Path, option: str) -> None:
    result = pytester.runpytest(f"{option}={pipe}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {option}: {str(pipe)!r}: {PIPE}; check the path" in result.errlines


def test_devices_sockets_and_folders(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(tmp_path)  # its path may be no longer than 107 bytes
        listening.bind("socket")
        for path, kind in (
            (tmp_path / "socket", "socket"),
            (Path("/dev/zero"), "device"),
            (tmp_path, "folder"),
        ):
            with pytest.raises(OSError, match=f"it is a {kind}, not a regular file"):
                check_regular(path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


def test_regular_files_and_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("naïve", encoding="utf-8")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link") == "naïve"
    assert read_bytes(tmp_path / "file") == "naïve".encode()
