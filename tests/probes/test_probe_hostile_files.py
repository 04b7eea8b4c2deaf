"""Hundreds of hostile or damaged probe files, each by way of every loader that would read it: none
runs code, hangs or takes more than 1 GiB, and each gives one clear line. They are loaded in one
process whose address space is capped, and its peak is read file by file."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile_files import CANARY, good, hostile, raw_call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_multigpu.errors import ProbeFileError
from pytest_multigpu.probes.formats import load_probe, save_probe
from pytest_multigpu.probes.synthetic import synthetic_probe

_LOADER = """
import json, pathlib, re, resource, sys, time
import numpy, torch, safetensors.torch
from pytest_multigpu.errors import ProbeFileError
from pytest_multigpu.probes.formats import load_probe
from pytest_multigpu.probes.formats import apollo, gguf, linear_head, native
def status(key):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(key + r":\\s+(\\d+) kB", text).group(1)) * 1024
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 2**30,) * 2)
found = {}
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    if not path.name.startswith("bad") or path.suffix == ".json":
        continue
    # The peak so far is forgotten: what comes is this file's.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.monotonic()
    try:
        load_probe(path)
        text = "LOADED"
    except ProbeFileError as error:
        text = str(error)
    found[path.name] = (text, time.monotonic() - start, status("VmHWM") - before)
print(json.dumps(found))
"""

REASONS = {
    **{
        f"{way}{kind}": reason
        for way in ("", "folder-", "zip-", "folder-old-", "old-")
        for kind, reason in {
            "posix.system": "refused: it names the global 'posix.system'",
            "torch.load": "refused: it names the global 'torch.load'",
            "nested-load": "refused: it names the global 'posix.system'",
            "nested-twice": "refused: it names the global 'torch.storage._load_from_bytes'",
            "object-dtype": "holds an array of dtype 'O8'; only plain numbers are read",
            "many": "refused: more than 20,000 pickle opcodes",
            "encode": "refused: it unpacks to more than 128 MiB",
            "storages": "refused: it unpacks to more than 128 MiB",
        }.items()
    },
    "zip-overlap": "refused: it unpacks to more than 128 MiB",
    "zip-directory": "refused: holds too many files",
    "protocol-0-in-2": "refused: pickle opcode ",
    "truncated": " is ",
    "truncated-zip": "is damaged (BadZipFile)",
    "gguf-values": "is a gguf of None, not of controlvector",
    "gguf-texts": "holds too many texts for a control vector",
    "zip-bomb": "is compressed, which torch.save never does",
    "memo": "refused: pickle memo slot 2,147,483,647",
    "bad-large": "is larger than 64 MiB",
    "bad-pipe": "it is a named pipe, not a regular file",
    "nothing": "is empty",
    "noise": "is of no known probe format",
}


MEMORY_BYTES = 1 << 30
FAILURES = {
    *("AttributeError", "BadZipFile", "EOFError", "IndexError", "KeyError", "RecursionError"),
    *(
        "SafetensorError",
        "TypeError",
        "UnicodeDecodeError",
        "UnpicklingError",
        "ValueError",
        "error",
    ),
}
"""What damaged bytes may do to a reader. No MemoryError, and no RuntimeError, which is what torch
makes of memory that it did not get."""


def test_hostile_files(tmp_path: Path) -> None:
    files = hostile(tmp_path)
    assert len(files) >= 800
    _, sidecar = save_probe(synthetic_probe(1, 1), tmp_path / "honest.safetensors")
    for name, data in files.items():
        if name.partition("-")[2].startswith(("zip", "folder", "truncated-zip")):
            # A head's weights, beside an honest description.
            (tmp_path / name).mkdir()
            (tmp_path / name / "probe_config.json").write_text('{"layer_idx": 4}')
            (tmp_path / name / "probe.pt").write_bytes(data)
            continue
        (tmp_path / name).write_bytes(data)
        if "header" in name:
            (tmp_path / name).with_suffix(".json").write_bytes(sidecar.read_bytes())
    with (tmp_path / "bad-large").open("wb") as large:
        large.truncate(80 << 30)  # Sparse: takes no space.
    os.mkfifo(tmp_path / "bad-pipe")
    done = subprocess.run(
        [sys.executable, "-c", _LOADER, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == len(files) + 2
    assert not (tmp_path / CANARY).exists()
    texts_of = {name: text for name, (text, _, _) in found.items()}
    assert {name for name, text in texts_of.items() if text == "LOADED"} == set()
    assert {name for name, text in texts_of.items() if "\n" in text} == set()
    assert {n for n, text in texts_of.items() if not text.startswith(str(tmp_path))} == set()
    assert {name: seconds for name, (_, seconds, _) in found.items() if seconds > 5} == {}
    assert {name: peak for name, (_, _, peak) in found.items() if peak > MEMORY_BYTES} == {}
    kinds = {
        name: match[1]
        for name, text in texts_of.items()
        if (match := re.search(r"is damaged \((\w+)\)", text))
    }
    assert {name: kind for name, kind in kinds.items() if kind not in FAILURES} == {}
    for kind, reason in REASONS.items():
        texts = [text for name, text in texts_of.items() if name.partition("-")[2] == kind]
        texts += [text for name, text in texts_of.items() if name == kind]
        assert texts
        assert [text for text in texts if reason not in text] == []


@pytest.mark.parametrize(
    ("module", "name"), [("posix", "system"), ("torch", "load"), ("builtins", "eval")]
)
def test_the_refused_global_is_named(tmp_path: Path, module: str, name: str) -> None:
    path = tmp_path / "detector.pt"
    path.write_bytes(raw_call(module, name, "true"))
    with pytest.raises(ProbeFileError) as error:
        load_probe(path)
    assert str(error.value) == (
        f"{path}: refused: it names the global '{module}.{name}', which no probe needs; "
        "do not load it with pickle or torch"
    )


def message_of(path: Path) -> str | None:
    """What the loader says of a file; None if it reads it."""
    try:
        load_probe(path)
    except ProbeFileError as error:
        return str(error)
    return None


def examples() -> list[Callable[[Path], Path]]:
    import torch

    def apollo(folder: Path) -> Path:
        (folder / "detector.pt").write_bytes(pickle.dumps(good()))
        return folder / "detector.pt"

    def arrays(folder: Path) -> Path:
        content = {"directions": {3: np.arange(8.0)}, "intercept": np.float64(0.5)}
        (folder / "arrays.pt").write_bytes(pickle.dumps(content))
        return folder / "arrays.pt"

    def native(folder: Path) -> Path:
        return save_probe(synthetic_probe(8, 4), folder / "native.safetensors")[0]

    def head(folder: Path) -> Path:
        inside = folder / "head"
        inside.mkdir(exist_ok=True)
        (inside / "probe_config.json").write_text('{"layer_idx": 4, "hidden_size": 8}')
        torch.save({"weight": torch.ones(1, 8), "bias": torch.ones(1)}, inside / "probe.pt")
        return inside / "probe.pt"

    def control_vector(folder: Path) -> Path:
        name = b"general.architecture"
        meta = struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, 13) + b"controlvector"
        spec = struct.pack("<Q", 11) + b"direction.3" + struct.pack("<IQIQ", 1, 8, 0, 0)
        start = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + meta + spec
        padding = bytes(-len(start) % 32)
        path = folder / "vector.gguf"
        path.write_bytes(start + padding + np.arange(8, dtype="<f4").tobytes())
        return path

    return [apollo, arrays, native, head, control_vector]


@pytest.mark.parametrize("make", examples(), ids=lambda make: make.__name__)
def test_undamaged_examples_load(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert message_of(make(tmp_path)) is None


@pytest.mark.parametrize("make", examples(), ids=lambda make: make.__name__)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_gives_a_probe_or_one_line(
    tmp_path: Path, make: Callable[[Path], Path], data: st.DataObject
) -> None:
    path = make(tmp_path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=4))
    path.write_bytes(bytes(content))
    text = message_of(path)
    assert text is None or (text.startswith(str(path.parent)) and "\n" not in text)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    head=st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"GGUF\x03\x00\x00\x00", b"PK\x03\x04"]),
    data=st.binary(max_size=200),
)
def test_noise_gives_one_line(tmp_path: Path, head: bytes, data: bytes) -> None:
    path = tmp_path / "noise"
    path.write_bytes(head + data)
    with pytest.raises(ProbeFileError) as error:
        load_probe(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
