"""Plants faults into a real pytest run: ``PLANT='[["nvml", {"gpus": 4}]]' pytest -p plant ...``.

Each entry of ``PLANT`` is a function of this module (without its leading ``plant_``) and its
arguments. Everything else is the product's own code. Only tests and campaigns load this.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent


def _put(where: Any, **new: Any) -> None:
    """Replace names of a module or class."""
    for name, value in new.items():
        setattr(where, name, value)


def pytest_configure() -> None:
    for name, arguments in json.loads(os.environ.get("PLANT", "[]")):
        globals()[f"plant_{name}"](**arguments)


# The machine


def plant_nvml(
    gpus: int = 4,
    change: dict[str, dict[str, Any]] | None = None,
    lose: list[int] | None = None,
    lose_later: dict[str, int] | None = None,
    hang: str | None = None,
    errors: dict[str, int] | None = None,
    arch_list: list[str] | None = None,
    torch: tuple[str, str | None] = ("2.11.0+cu128", "12.8"),
    unseen: list[int] | None = None,
    start_error: str | None = None,
    by_speed: list[int] | None = None,
    driver_order: bool = True,
    **options: Any,
) -> None:
    """A machine of ``machine/fake.py``, a torch that can use it, and a worker that stands for it.

    :param change: GPU to the fields to set on its ``FakeGpu``.
    :param lose: GPUs lost from the start.
    :param lose_later: function to the GPU that is lost once it was called for every GPU.
    :param hang: the function that never answers.
    :param unseen: GPUs that the worker's CUDA does not see.
    :param start_error: what CUDA says when it is started.
    :param by_speed: the GPUs, fastest first: CUDA's order unless CUDA_DEVICE_ORDER is PCI_BUS_ID.
    :param driver_order: False: the driver does not tell that order, only the worker does.
    """
    from pytest_multigpu.errors import MachineError
    from pytest_multigpu.machine import nvml, torch_build
    from pytest_multigpu.machine.fake import FakeNvml
    from pytest_multigpu.machine.visibility import read_visibility

    fake = FakeNvml(gpus, errors=errors, **options)
    keywords: Any = nvml.read_machine.__kwdefaults__
    for number, fields in (change or {}).items():
        _put(fake.gpus[int(number)], **fields)
    for index in lose or ():
        fake.lose(index)
    for function, index in (lose_later or {}).items():
        _lose_later(fake, function, index)
    if hang is not None:
        fake.hang = hang
        keywords["seconds"] = 2.0
    _put(nvml, load_nvml=lambda: fake)
    _put(torch_build, read_torch_build=lambda: tuple(torch))

    def in_cuda_order(environ: Mapping[str, str]) -> tuple[int, ...]:
        rows = nvml.read_machine({}, fake, ask_cuda=untold).gpus
        by_bus = by_speed is None or environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        ordered = rows if by_bus else [rows[index] for index in by_speed or ()]
        # CUDA counts a mask's indices in its own order, whatever that is.
        return read_visibility(environ.get("CUDA_VISIBLE_DEVICES"), ordered, "PCI_BUS_ID").visible

    def untold(environ: Mapping[str, str]) -> tuple[str, ...]:
        raise MachineError("could not be asked: CUDA error 999")

    def told(environ: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(fake.gpus[index].uuid for index in in_cuda_order(environ))

    keywords["ask_cuda"] = told if driver_order else untold

    def standins() -> list[list[str]]:
        return [
            [fake.gpus[index].uuid, fake.gpus[index].name]
            for index in in_cuda_order(os.environ)
            if index not in (unseen or ())
        ]

    extra = [f"--arch-list={json.dumps(arch_list)}"] if arch_list is not None else []
    if start_error is not None:
        extra.append(f"--problem={start_error}")
    _WORKER.update(standins=standins, extra=extra)
    plant_worker()


_WORKER: dict[str, Any] = {"standins": None, "extra": []}


def _lose_later(fake: Any, function: str, index: int) -> None:
    calls = 0

    def before(called: str) -> None:
        nonlocal calls
        calls += called == function
        if calls > len(fake.gpus):
            fake.lose(index)

    fake.before_call = before


def plant_worker(fault: dict[str, Any] | None = None, seconds: float | None = None) -> None:
    """The worker with a fault of ``faulty_worker.py``, on stand-ins if the NVML is a fake.

    :param seconds: its hard limit.
    """
    from pytest_multigpu.machine import worker

    real = _WORKER.setdefault("start", worker.start_worker)

    def start(*, timeout_s: float, **options: Any) -> Any:
        arguments = [] if fault is None else [f"--fault={json.dumps(fault)}"]
        script = "faulty_worker.py"
        if _WORKER["standins"] is not None:
            script = "standin_worker.py"
            arguments += [f"--gpus={json.dumps(_WORKER['standins']())}", *_WORKER["extra"]]
            arguments += ["--memory-bytes=1048576", "--load-seconds=0"]
            options["copy_bytes"] = 1 << 20
        return real(
            timeout_s=seconds or timeout_s,
            command=(sys.executable, "-u", str(SUPPORT / script)),
            arguments=arguments,
            **options,
        )

    _put(worker, start_worker=start)


def plant_no_fork() -> None:
    """No process can be started, as at a limit on their number."""
    import subprocess

    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    _put(subprocess, Popen=refuse)


def plant_no_nvml() -> None:
    """No NVIDIA library on a machine that has the GPUs' device files."""
    from pytest_multigpu.machine import nvml
    from pytest_multigpu.machine.fake import FakeNvml

    fake = FakeNvml(0, errors={"nvmlInit": nvml.LIBRARY_NOT_FOUND})
    _put(nvml, load_nvml=lambda: fake)
    _put(nvml, count_device_files=lambda: 4)


def plant_no_binding() -> None:
    """nvidia-ml-py is not installed."""
    from pytest_multigpu.machine import nvml

    def missing() -> Any:
        raise ImportError("No module named 'pynvml'")

    _put(nvml, load_nvml=missing)


# The host


def plant_host(**fields: Any) -> None:
    """Fields of ``HostMemory``."""
    from pytest_multigpu.machine import host

    real = host.read_host_memory
    _put(host, read_host_memory=lambda: dataclasses.replace(real(), **fields))


# The model


def _after_load(spoil: Callable[[Any], None]) -> None:
    from pytest_multigpu.model import loading

    real = loading.load_model

    def load(*arguments: Any, **options: Any) -> Any:
        loaded = real(*arguments, **options)
        spoil(loaded)
        return loaded

    _put(loading, load_model=load)


def _after_assembly(spoil: Callable[[Any], None]) -> None:
    """Before the placement is observed."""
    from pytest_multigpu.model import loading

    real = loading._assemble

    def assemble(*arguments: Any) -> Any:
        model, info = real(*arguments)
        spoil(model)
        return model, info

    _put(loading, _assemble=assemble)


def plant_layer(layer: int | None = None, gpu: int | None = None, how: str = "zero") -> None:
    """A decoder layer's output is ``zero``, ``nan``, ``noise`` (other each time), or wrong only
    while ``decoding``. With ``gpu``: the first layer there."""

    def spoil(loaded: Any) -> None:
        import torch

        layers = loaded.decoder_layers
        chosen = layer
        if gpu is not None:
            devices = [str(loaded.layer_device(i)) for i in range(len(layers))]
            chosen = devices.index(f"cuda:{gpu}")

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            if how == "zero":
                return output * 0
            if how == "nan":
                return output * float("nan")
            if how == "noise":
                return output + torch.randn_like(output) * output.float().std().to(output.dtype)
            return output.flip(-1) if output.shape[1] == 1 else output

        layers[chosen].register_forward_hook(hook)

    _after_load(spoil)


def plant_boundary(gpu: int) -> None:
    """What arrives at the first layer of a GPU differs from what was sent."""

    def spoil(loaded: Any) -> None:
        layers = loaded.decoder_layers
        devices = [str(loaded.layer_device(i)) for i in range(len(layers))]

        def hook(_module: Any, args: Any, kwargs: Any) -> Any:
            changed = args[0].clone()
            changed.reshape(-1)[0] += 1
            return (changed, *args[1:]), kwargs

        layers[devices.index(f"cuda:{gpu}")].register_forward_pre_hook(hook, with_kwargs=True)

    _after_load(spoil)


def plant_meta_layer(layer: int) -> None:
    """A layer's weights never arrived: they lie on ``meta``."""
    _after_assembly(lambda model: model.model.layers[layer].to("meta"))


def plant_short_weight() -> None:
    """The output head lost half of its rows."""

    def spoil(model: Any) -> None:
        import torch

        weight = model.lm_head.weight
        half = weight[: len(weight) // 2].clone()
        model.lm_head.weight = torch.nn.Parameter(half, requires_grad=False)

    _after_assembly(spoil)


def plant_weight_nan() -> None:
    """One weight of the head is not a number."""

    def spoil(loaded: Any) -> None:
        import torch

        with torch.no_grad():
            loaded.model.lm_head.weight[3, 3] = float("nan")

    _after_load(spoil)


def plant_map(device_map: dict[str, int | str]) -> None:
    """The loader puts blocks elsewhere than the plan says."""
    from pytest_multigpu.model import loading

    real = loading.load_model

    def load(*arguments: Any, **options: Any) -> Any:
        return real(*arguments, **(options | {"device_map": device_map}))

    _put(loading, load_model=load)


def plant_load(how: str, seconds: float = 3600.0) -> None:
    """Loading ``raise``s out of memory, ``hang``s, or the whole run is ``kill``ed."""
    from pytest_multigpu.model import loading

    def assemble(*_arguments: Any) -> Any:
        import torch

        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(seconds)
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 448.00 MiB. GPU 1 has a total capacity of "
            "79.18 GiB of which 12.00 MiB is free."
        )

    _put(loading, _assemble=assemble)


def plant_fill(gpu: int) -> None:
    """This process fills a GPU to the last MiB after planning, before loading."""
    from pytest_multigpu.model import loading

    real = loading.load_model

    def load(*arguments: Any, **options: Any) -> Any:
        import torch

        held = []
        size = 1 << 33
        while size >= 1 << 20:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device=f"cuda:{gpu}"))
            except torch.OutOfMemoryError:
                size //= 2
        try:
            return real(*arguments, **options)
        finally:
            held.clear()

    _put(loading, load_model=load)


def plant_generation(how: str) -> None:
    """Generating ``hang``s or the run is ``kill``ed while it generates."""
    from pytest_multigpu.model import generation

    def generate(*_arguments: Any, **_options: Any) -> Any:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)

    _put(generation, generate=generate)


def plant_report_kill() -> None:
    """SIGKILL in the middle of the write of ``report.json`` that ends the third test."""
    from pytest_multigpu.report.folder import ReportFile

    real = ReportFile.update

    def update(self: Any, report: Any) -> None:
        if len(report.checks) == 3:
            _put(os, fsync=lambda handle: os.kill(os.getpid(), signal.SIGKILL))
        real(self, report)

    _put(ReportFile, update=update)


def plant_meter(used: int | None) -> None:
    """The resident size that the peak meter reads; None: nobody can say."""
    from pytest_multigpu.model import witness

    _put(witness, _resident_bytes=lambda: used)


# The scorer


def plant_scorer(mistake: str) -> None:
    """A mistake of existing scorers, by name."""
    _SCORERS[mistake]()


def _off_by_one() -> None:
    from pytest_multigpu.probes import capture

    real = capture.Anatomy.source

    def source(self: Any, layer: int) -> Any:
        return real(self, min(layer + 1, self.num_layers))

    # Only the scorer's own path: the shared forward watches every layer.
    def shifted(model: Any, ids: Any, layers: Any, **options: Any) -> Any:
        _put(capture.Anatomy, source=source)
        try:
            return honest(model, ids, layers, **options)
        finally:
            _put(capture.Anatomy, source=real)

    honest = capture.capture
    _replace_capture(shifted)


def _batch_row_0() -> None:
    from pytest_multigpu.probes import capture

    honest = capture.capture

    def first_row(*arguments: Any, **options: Any) -> Any:
        found = honest(*arguments, **options)
        return {layer: x[:1].expand_as(x) for layer, x in found.items()}

    _replace_capture(first_row)


def _replace_capture(other: Any) -> None:
    _put_everywhere("capture", other)


def _put_everywhere(name: str, new: Any) -> None:
    """In each module of the probes that knows a function by this name."""
    from pytest_multigpu import probes

    for info in pkgutil.walk_packages(probes.__path__, "pytest_multigpu.probes."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            if callable(getattr(module, name, None)):
                setattr(module, name, new)


def _raw_site() -> None:
    _put_everywhere("at_site", lambda model, stream, site: stream)


def _unpadded_mask() -> None:
    from pytest_multigpu.probes import scoring

    real = scoring.pad

    def unmasked(rows: Any, side: Any) -> Any:
        padded = real(rows, side)
        padded.mask.fill_(1)
        return padded

    _put(scoring, pad=unmasked)


def _narrow_span() -> None:
    from pytest_multigpu.probes.probe import TokenMask
    from pytest_multigpu.probes.spans import Chat

    real = Chat.mask
    _put(Chat, mask=lambda self, rule: real(self, TokenMask()))


def _moved_module() -> None:
    import copy

    from pytest_multigpu.probes import capture

    honest = capture.Anatomy.source
    watching: list[bool] = []

    def source(self: Any, layer: int) -> Any:
        module = honest(self, layer)
        return copy.deepcopy(module) if watching else module

    real = capture.capture

    def moved(*arguments: Any, **options: Any) -> Any:
        watching.append(True)
        try:
            return real(*arguments, **options)
        finally:
            watching.pop()

    _put(capture.Anatomy, source=source)
    _replace_capture(moved)


def _scaler_elsewhere() -> None:
    from pytest_multigpu.probes import scoring

    real = scoring.to_device
    calls = 0

    def misplaced(vector: Any, device: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(vector, "meta" if calls % 3 == 2 else device)  # type: ignore[arg-type]

    _put(scoring, to_device=misplaced)


def _broken() -> None:
    from pytest_multigpu.probes import scoring

    def layer_scores(*_arguments: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nand more")

    _put(scoring, _layer_scores=layer_scores)


def _inverted() -> None:
    from pytest_multigpu.probes import scoring

    real = scoring.score_activations

    def negative(*arguments: Any) -> Any:
        return tuple(-value for value in real(*arguments))

    _put_everywhere("score_activations", negative)


def _half() -> None:
    """The script that this project replaces: whatever goes wrong, 0.5."""

    def always(_probe: Any, activations: Any) -> Any:
        return (0.5,) * len(next(iter(activations.values())))

    _put_everywhere("score_activations", always)


def _nan_text() -> None:
    """The first text of the text set has no score; every other scoring is sound."""
    from pytest_multigpu.probes import drift, scoring

    real = scoring.score_tokens

    def spoiled(*arguments: Any, **options: Any) -> Any:
        first, *others = real(*arguments, **options)
        if calls:
            return [first, *others]
        calls.append(1)
        return [dataclasses.replace(first, value=float("nan")), *others]

    calls: list[int] = []
    _put(drift, score_tokens=spoiled)


_SCORERS: dict[str, Callable[[], None]] = {
    "off by one": _off_by_one,
    "batch row 0": _batch_row_0,
    "raw site": _raw_site,
    "unpadded mask": _unpadded_mask,
    "narrow span": _narrow_span,
    "moved module": _moved_module,
    "scaler elsewhere": _scaler_elsewhere,
    "broken": _broken,
    "inverted": _inverted,
    "0.5": _half,
    "nan text": _nan_text,
}
