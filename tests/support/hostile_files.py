# ruff: noqa: E501 -- one hostile file a line
"""Hostile and damaged probe files, made by hand: what a pickle, a zip, a safetensors or a gguf file
can do to whoever opens it. Nothing here is ever unpickled by Python's own unpickler."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CANARY = "canary"
"""What a file that runs code would leave in its folder."""


class Call:
    """Pickles as a call of ``module.name`` without importing it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def raw_call(module: str, name: str, argument: str, protocol: int = 2) -> bytes:
    """A pickle that calls ``module.name(argument)``, by hand."""
    text = argument.encode()
    if protocol == 2:
        glob = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    else:
        glob = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93"
    argument_code = b"X" + struct.pack("<I", len(text)) + text
    return b"\x80" + bytes([protocol]) + glob + argument_code + b"\x85R."


def good() -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    return {
        "layers": [22],
        "directions": torch.randn(1, 16),
        "scaler_mean": torch.randn(1, 16),
        "scaler_scale": torch.rand(1, 16) + 0.5,
        "normalize": True,
        "reg_coeff": 1e3,
    }


def legacy_storage(count: int, values: bytes, kind: str = "FloatStorage") -> bytes:
    """A storage as torch's old format writes it, with a count of one's own."""
    text: Callable[[str], bytes] = lambda t: b"X" + struct.pack("<I", len(t)) + t.encode()  # noqa: E731
    number = b"\x8a\x08" + struct.pack("<q", count)
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    body = b"\x80\x02(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text("0")
    body += text("cpu") + number + b"NtQ."
    return head + body + pickle.dumps(["0"], 2) + struct.pack("<q", count) + values


def tensor_of(storage: bytes, size: str, stride: str, offset: int = 0) -> bytes:
    """A ``{"directions": tensor}`` pickle over a storage, with shape and stride of one's own."""

    def numbers(t: str) -> bytes:
        return b"(" + b"".join(pickle.dumps(int(n), 2)[2:-1] for n in t.split()) + b"t"

    out = b"\x80\x02}(X\x0a\x00\x00\x00directionsctorch._utils\n_rebuild_tensor_v2\n("
    out += b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(storage)) + storage
    out += b"\x85R" + pickle.dumps(offset, 2)[2:-1] + numbers(size) + numbers(stride)
    out += b"\x89ccollections\nOrderedDict\n)RtR"
    return out + b"X\x06\x00\x00\x00layers]K\x16au."


def zip_of(data: bytes) -> bytes:
    """A pickle where ``torch.save``'s zip has its own."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a/data.pkl", data)
    return made.getvalue()


def legacy_of(data: bytes) -> bytes:
    """A pickle as the body of ``torch.save``'s old kind of file."""
    heads: tuple[Any, ...] = (0x1950A86A20F9469CFC6C, 1001, {})
    return b"".join(pickle.dumps(head, 2) for head in heads) + data + pickle.dumps([], 2)


def overlapping_zip(count: int, values: int) -> bytes:
    """Stored files that each hold all those after it, down to the same values: of one storage
    ``count``. Lengths and checksums are right."""
    import zlib

    def local(name: bytes, data: bytes) -> bytes:
        sizes = struct.pack("<III", zlib.crc32(data), len(data), len(data))
        return b"PK\x03\x04" + bytes([20, 0]) + bytes(8) + sizes + struct.pack("<HH", len(name), 0)

    text: Callable[[str], bytes] = lambda t: b"X" + struct.pack("<I", len(t)) + t.encode()  # noqa: E731
    number: Callable[[int], bytes] = lambda n: b"J" + struct.pack("<i", n)  # noqa: E731
    data, files, body = bytes(values * 4), [], b"\x80\x02("
    for index in range(count):
        # Names of five letters and headers of 30 bytes: together a whole number of float32.
        name = f"a/data/{index:03}".encode()
        files.append((name, data))
        body += b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(f"{index:03}")
        body += text("cpu") + number(len(data) // 4) + b"tQ"
        data = local(name, data) + name + data
    body += b"l."
    start = local(b"a/data.pkl", body) + b"a/data.pkl" + body
    whole = start + data
    directory = b""
    for name, content in [(b"a/data.pkl", body), *files]:
        at = 0 if content is body else len(whole) - len(local(name, content) + name + content)
        sizes = struct.pack("<III", zlib.crc32(content), len(content), len(content))
        entry = b"PK\x01\x02" + bytes([20, 0, 20, 0]) + bytes(8) + sizes
        directory += entry + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, at) + name
    end = struct.pack("<HHHHIIH", 0, 0, count + 1, count + 1, len(directory), len(whole), 0)
    return whole + directory + b"PK\x05\x06" + end


def hostile(folder: Path) -> dict[str, bytes]:
    """File name to content; the sidecars are written too."""
    import torch

    touch = f"touch {folder / CANARY}"
    files: dict[str, bytes] = {}

    def add(kind: str, data: bytes) -> None:
        files[f"bad{len(files):03}-{kind}"] = data

    calls = [
        *(("posix", "system"), ("os", "system"), ("os", "popen"), ("nt", "system")),
        *(("builtins", "eval"), ("builtins", "exec"), ("builtins", "__import__")),
        *(("builtins", "getattr"), ("builtins", "open"), ("__builtin__", "eval")),
        *(("subprocess", "Popen"), ("subprocess", "check_output"), ("pty", "spawn")),
        *(("torch", "load"), ("torch.serialization", "load"), ("torch.hub", "load")),
        *(("runpy", "run_path"), ("importlib", "import_module"), ("shutil", "rmtree")),
        *(("numpy", "load"), ("numpy.core.multiarray", "fromfile"), ("pickle", "loads")),
        *(("_pickle", "loads"), ("operator", "attrgetter"), ("functools", "partial")),
        *(("torch.storage", "_load_from_bytes.__globals__"), ("collections", "namedtuple")),
        *(("torch._utils", "_rebuild_parameter"), ("webbrowser", "open"), ("socket", "socket")),
    ]
    for module, name in calls:
        for protocol in (2, 4):
            add(f"{module}.{name}", raw_call(module, name, touch, protocol))
    for protocol in (2, 3, 4, 5):
        for function in (os.system, eval, exec, os.listdir):
            add("nested-call", pickle.dumps({**good(), "x": Call(function, touch)}, protocol))
            add("key-call", pickle.dumps({"directions": [Call(function, touch)]}, protocol))
        inner = pickle.dumps(Call(os.system, touch), protocol)
        add("nested-load", pickle.dumps(Call(torch.storage._load_from_bytes, inner), protocol))
        twice = pickle.dumps(Call(torch.storage._load_from_bytes, inner), protocol)
        add("nested-twice", pickle.dumps(Call(torch.storage._load_from_bytes, twice), protocol))
        add(
            "object-array",
            pickle.dumps({"directions": np.array([Call(os.system, touch)])}, protocol),
        )
        add("object-dtype", pickle.dumps({"directions": {1: np.array([None, 1])}}, protocol))
        add("structured", pickle.dumps({"directions": np.zeros(3, "f4,i4")}, protocol))
        add("text-array", pickle.dumps({"directions": np.array(["a" * 40])}, protocol))
    for line in (b"cos\nsystem\n(S'true'\ntR.", b"(S'true'\nios\nsystem\n.", b"I1\n."):
        add("protocol-0", line)
        add("protocol-0-in-2", b"\x80\x02" + line)
    whole = pickle.dumps(good())
    for cut in range(1, len(whole), max(1, len(whole) // 25)):
        add("truncated", whole[:cut])
    new = io.BytesIO()
    torch.save(good(), new)
    for cut in range(10, len(new.getvalue()), len(new.getvalue()) // 10):
        add("truncated-zip", new.getvalue()[:cut])
    # Shapes and storages that declare more than there is, or make much out of little.
    eight = np.zeros(8, np.float32).tobytes()
    for count in (9, 1 << 24, 1 << 40, -1, (1 << 62)):
        add("huge-storage", tensor_of(legacy_storage(count, eight), "1 8", "8 1"))
    for size, stride in (
        *(("1 9", "9 1"), ("100000 100000", "0 0"), ("1000000000", "0"), ("8388608 2", "0 0")),
        *(
            ("-1 8", "8 1"),
            ("1 8", "-8 1"),
            ("0 8", "8 1"),
            ("8", "8 1"),
            ("2 2 2 2 2", "0 0 0 0 0"),
        ),
    ):
        add("huge-shape", tensor_of(legacy_storage(8, eight), size, stride))
    add("offset", tensor_of(legacy_storage(8, eight), "1 8", "8 1", offset=1))
    add("wide-view", tensor_of(legacy_storage(8, eight), "1 8388608", "0 0"))
    add("many-rows", tensor_of(legacy_storage(8, eight), "8388608 1", "0 0"))
    add("many-rows", tensor_of(legacy_storage(8, eight), "2097152 2 2", "0 0 0"))
    add("memo", b"\x80\x02}r" + struct.pack("<I", 0x7FFFFFFF) + b".")
    add("memo-small", b"\x80\x02}r" + struct.pack("<I", 30_000) + b".")
    add("bytes8", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".")
    add("bytearray8", b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".")
    add("unicode8", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".")
    add("frame", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.")
    add("many", b"\x80\x02" + b"]" * 3_000_000 + b".")
    add("deep", b"\x80\x02" + b"]" + b"\x85" * 19_000 + b".")
    add("deep-key", b"\x80\x02})" + b"\x85" * 19_000 + b"Ns.")
    add("laughs", b"\x80\x02]q\x00" + b"(h\x00h\x00lq\x00" * 40 + b".")
    add("self", b"\x80\x02}q\x00X\x0a\x00\x00\x00directionsh\x00s.")
    text = "a" * (4 << 20)
    many = b"\x80\x02(X" + struct.pack("<I", len(text)) + text.encode() + b"q\x000"
    many += b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR" * 400 + b"l."
    add("encode", many)
    shared = legacy_storage(1 << 20, bytes(2 << 20), "BFloat16Storage")
    add(
        "storages",
        b"\x80\x02(B"
        + struct.pack("<I", len(shared))
        + shared
        + b"q\x000"
        + b"ctorch.storage\n_load_from_bytes\nh\x00\x85R" * 1000
        + b"l.",
    )
    # Wrong content.
    base = good()
    wrong: list[Any] = [
        [], 5, None, "text", {}, {"layers": [22]}, {**base, "layers": None}, {**base, "layers": [1, 2]},
        {**base, "layers": ["a"]}, {**base, "layers": [-1]}, {**base, "layers": [True]},
        {**base, "surprise": 1}, {**base, "directions": None}, {**base, "directions": "x"},
        {**base, "directions": torch.zeros(1, 16)}, {**base, "directions": torch.ones(1, 3)},
        {**base, "directions": torch.ones(1, 16, dtype=torch.bool)},
        {**base, "directions": torch.ones(1, 16, dtype=torch.complex64)},
        {**base, "directions": torch.full((1, 16), float("nan"))},
        {**base, "scaler_scale": torch.zeros(1, 16)}, {**base, "scaler_scale": None},
        {**base, "scaler_mean": torch.full((1, 16), float("inf"))},
        {**base, "normalize": 1}, {**base, "intercept": "x"}, {**base, "intercept": [1.0, 2.0]},
        {**base, "intercept": float("nan")}, {**base, "exclude_last_n_tokens": -1},
        {**base, "model_name": 5}, {"directions": {}}, {"directions": {1: np.ones(3), 2: np.ones(4)}},
        {"directions": {"x": np.ones(3)}}, {"directions": {1: np.ones((2, 2))}},
        {**base, ("a", "b"): 1}, {"layers": 3, "directions": np.ones((0, 4))},
    ]  # fmt: skip
    for content in wrong:
        add("content", pickle.dumps(content))
    # The same by way of a linear head: raw, in torch's zip, and in its old kind of file; and as a
    # detector of that kind.
    for name, content in list(files.items()):
        what = name.partition("-")[2]
        if "zip" not in what:
            add(f"folder-{what}", content)
            add(f"zip-{what}", zip_of(content))
            add(f"folder-old-{what}", legacy_of(content))
            add(f"old-{what}", legacy_of(content))
    # Zip bombs, safetensors and gguf with lies in their headers.
    add("zip-overlap", overlapping_zip(300, 1 << 20))
    entries = (40 << 20) // 46
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, entries * 46, 4, 0)
    add(
        "zip-directory", b"PK\x03\x04" + (b"PK\x01\x02" + bytes(42)) * entries + b"PK\x05\x06" + end
    )
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", compression) as archive:
            archive.writestr("a/data.pkl", bytes(8 << 20))
        add("zip-bomb", made.getvalue())
    add("zip-empty", b"PK\x03\x04" + bytes(100))
    for length in (0, 1, 1 << 20, 1 << 40, (1 << 64) - 1):
        add("header-length", struct.pack("<Q", length) + b'{"a":1}')
    for shape, offsets in (([1 << 40], [0, 4]), ([-1], [0, 4]), ([1], [0, 1 << 40]), ([2], [4, 0])):
        header = json.dumps(
            {"direction.1": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
        )
        add("header", struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    for numbers in (
        (3, 1 << 60, 0),
        (3, 0, 1 << 60),
        (3, 0, 0),
        (9, 1, 1),
        (3, 1, 1),
        (3, 1000, 4000),
    ):
        add("gguf", b"GGUF" + struct.pack("<IQQ", *numbers))
    key: Callable[[str], bytes] = lambda t: struct.pack("<Q", len(t)) + t.encode()  # noqa: E731
    meta = key("general.architecture") + struct.pack("<I", 8) + key("controlvector")
    for dims, kind, offset in (
        *(((1 << 40,), 0, 0), ((8, 8), 0, 0), ((), 0, 0), ((8,), 2, 0), ((8,), 0, 1 << 62)),
        *(((0,), 0, 0), ((1 << 32, 1 << 32), 0, 0)),
    ):
        spec = (
            key("direction.1")
            + struct.pack("<I", len(dims))
            + b"".join(struct.pack("<Q", d) for d in dims)
        )
        spec += struct.pack("<IQ", kind, offset)
        add("gguf-tensor", b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + meta + spec + bytes(96))
    array = key("a") + struct.pack("<IIQ", 9, 4, 1 << 60)
    add("gguf-array", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    add(
        "gguf-array",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("a") + struct.pack("<II", 9, 9) * 50,
    )
    # 40 million values that nobody asks for.
    arrays = (key("a") + struct.pack("<IIQ", 9, 0, 1 << 16) + bytes(1 << 16)) * 640
    add("gguf-values", b"GGUF" + struct.pack("<IQQ", 3, 0, 640) + arrays)
    arrays = (key("a") + struct.pack("<IIQ", 9, 8, 1 << 16) + bytes(8 << 16)) * 80
    add("gguf-texts", b"GGUF" + struct.pack("<IQQ", 3, 0, 80) + arrays)
    add("nothing", b"")
    add("noise", bytes(range(256)) * 20)
    return files
