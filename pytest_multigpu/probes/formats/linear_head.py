"""A linear head's state_dict (``weight``, ``bias``) beside its ``probe_config.json``.

``layer_idx`` counts blocks: block i gives ``hidden_states[i + 1]``. One output row is the score;
two rows are the classes of a softmax, the second positive, whose log-odds are the score.
Imports :mod:`.pickles`, :mod:`..probe`, errors; numpy inside functions.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from ...errors import ProbeFileError
from ..probe import AGGREGATIONS, SITES, Probe
from .guard import guarded
from .jsonfile import Fields, read_object
from .masks import described, read_mask
from .pickles import read_pickle, read_torch_pickle

CONFIG = "probe_config.json"
ADAPTER = "adapter_config.json"
"""A LoRA beside the head, as published trainers save it: the model without it scores otherwise."""
_KEYS = (
    "layer_idx",
    "hidden_size",
    "model_name",
    "site",
    "aggregation",
    "mask",
    "positive_class",
    "threshold",
    # The hooked module's class, as published trainers write it; it does not enter a score.
    "target_layer_name",
)
WEIGHTS = (
    "probe.safetensors",
    "model.safetensors",
    "probe_head.bin",
    "probe.pt",
    "probe.bin",
    "probe_head.pt",
    "pytorch_model.bin",
)


def has_config(path: Path) -> bool:
    """Whether ``probe_config.json`` lies beside a weights file that has no JSON of its own."""
    return (path.parent / CONFIG).is_file() and not path.with_suffix(".json").is_file()


def load(path: Path) -> Probe:
    """:param path: the folder, or the weights in it.
    :raises ProbeFileError: either file is missing, refused, damaged or does not fit the other.
    """
    from . import MAX_JSON_BYTES, read_bounded

    folder = path if path.is_dir() else path.parent
    config = folder / CONFIG
    if not config.is_file():
        raise ProbeFileError(f"{path}: {CONFIG} is missing beside it; it says which layer to read")
    weights = path if path.is_file() else _weights(folder)
    if (folder / ADAPTER).is_file():
        raise ProbeFileError(
            f"{folder}: holds {ADAPTER}: the head was fitted on a model with that adapter, which "
            "is not loaded here; merge it into the model and put the head into a folder of its own"
        )
    fields = Fields(config, read_object(config, read_bounded(config, MAX_JSON_BYTES)))
    fields.known(*_KEYS)
    tensors = _state_dict(weights, read_bounded(weights))
    weight, bias = guarded(weights, lambda: _head(weights, tensors))
    probe = Probe(
        layers=(fields.integer("layer_idx") + 1,),
        directions=(weight,),
        bias=bias,
        site=fields.choice("site", SITES, "raw"),
        aggregation=fields.choice("aggregation", AGGREGATIONS, "mean"),
        mask=read_mask(fields),
        model=fields.text("model_name", None),
        positive_class=fields.text("positive_class", "positive"),
        threshold=fields.number("threshold", None),
        dtype=str(weight.dtype),
        source=str(weights),
        format="linear-head",
    )
    fields.text("target_layer_name", None)
    declared = fields.integer("hidden_size", None)
    if declared is not None and declared != probe.hidden_size:
        fields.fail("hidden_size", f"{declared} is not the weight's {probe.hidden_size}")
    return probe


def _weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ProbeFileError(f"{folder}: holds no weights beside {CONFIG}; one of {', '.join(WEIGHTS)}")


def _state_dict(path: Path, data: bytes) -> dict[Any, Any]:
    from .native import is_safetensors, read_tensors

    if data[:4] == b"PK\x03\x04":
        content = _read_zip(path, data)
    elif data[:1] == b"\x80" and not is_safetensors(data):
        content = read_pickle(path, data)
    else:
        content = read_tensors(path, data)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ProbeFileError(f"{path}: is not a state_dict")
    return content


_MAX_FILES = 4096
"""In a zip; a head has about six."""


def _read_zip(path: Path, data: bytes) -> Any:
    """``torch.save``'s zip. It stores without compression; anything compressed is refused."""

    def read() -> Any:
        # The directory is read whole before anybody can ask how long it is.
        if data.count(b"PK\x01\x02") > _MAX_FILES:
            raise ProbeFileError(f"{path}: refused: holds too many files")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise ProbeFileError(f"{path}: refused: holds a file twice")
            for info in members.values():
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                    raise ProbeFileError(
                        f"{path}: refused: {info.filename!r:.60} is compressed, "
                        "which torch.save never does"
                    )
            pickles = [
                name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")
            ]
            if len(pickles) != 1:
                raise ProbeFileError(f"{path}: holds no data.pkl; is it written by torch.save?")
            root = pickles[0].removesuffix("data.pkl")
            return read_torch_pickle(
                path, archive.read(pickles[0]), lambda key: archive.read(f"{root}data/{key}")
            )

    return guarded(path, read)


def _head(path: Path, tensors: dict[Any, Any]) -> tuple[Any, float]:
    import numpy as np

    arrays = {k: v for k, v in tensors.items() if isinstance(v, np.ndarray)}
    kinds = {end: [k for k in arrays if str(k).split(".")[-1] == end] for end in ("weight", "bias")}
    if len(kinds["weight"]) != 1 or len(kinds["bias"]) > 1 or len(arrays) > 2:
        names = ", ".join(str(k)[:40] for k in list(arrays)[:8]) or "no tensor"
        raise ProbeFileError(f"{path}: is not one linear layer: holds {names}")
    weight = np.atleast_2d(arrays[kinds["weight"][0]])
    bias = np.atleast_1d(arrays[kinds["bias"][0]]) if kinds["bias"] else np.zeros(len(weight))
    if weight.ndim != 2 or len(weight) not in (1, 2) or bias.shape != (len(weight),):
        text = f"weight {weight.shape} with bias {bias.shape} is not a head of one or two classes"
        raise ProbeFileError(f"{path}: {text}")
    if weight.dtype.kind != "f" or bias.dtype.kind != "f":
        raise ProbeFileError(f"{path}: weight is {weight.dtype}, not a floating-point number")
    if len(weight) == 2:
        wide = weight.astype(np.float64)
        return wide[1] - wide[0], float(bias[1]) - float(bias[0])
    return weight[0], float(bias[0])


def unfit(probe: Probe) -> str:
    """Why a probe can't be a linear head; empty if it can."""
    if len(probe.layers) > 1:
        return f"reads one layer, and the probe {len(probe.layers)}"
    return (
        "" if probe.layers[0] else "reads a block's output, and the probe the embedding (layer 0)"
    )


def files(probe: Probe, _name: str) -> list[dict[str, bytes]]:
    """``probe.safetensors`` and ``probe_config.json``."""
    import numpy as np
    from safetensors.numpy import save

    from .native import stored_as

    kind = stored_as(probe.directions[0], np.array([probe.bias]))
    tensors = {
        "weight": probe.directions[0].astype(kind)[None],
        "bias": np.array([probe.bias], dtype=kind),
    }
    content = {
        "layer_idx": probe.layers[0] - 1,
        "hidden_size": probe.hidden_size,
        "site": probe.site,
        "aggregation": probe.aggregation,
        "mask": described(probe.mask),
        "positive_class": probe.positive_class,
        "model_name": probe.model,
        "threshold": probe.threshold,
    }
    sidecar = json.dumps(content, indent=2) + "\n"
    return [{WEIGHTS[0]: save(tensors), CONFIG: sidecar.encode()}]
