"""How fast a model gets onto the GPUs: this package's loader beside transformers' own.

``python benchmarks/load.py --layers 8`` writes a synthetic checkpoint of that depth into
``/dev/shm`` (16 threads), loads it alternately with both loaders in 16, 8 and 4 bit, synthesises
it as well, and prints JSON: seconds of every run, medians, ratios, rates, host memory, peaks.

``--compare`` loads both side by side (the last round of stock's) and compares every tensor and
statistic with ``torch.equal``, of the checkpoint or of what is synthesised: stock takes minutes for
the whole 70B in 8 bit. ``--readers`` measures fastsafetensors and runai-model-streamer,
where they are installed, beside a bare parallel read. ``--cold`` drops the files from the page
cache before each run (give ``--folder`` on a disk). ``--host-limit 8`` lets the process have 8 GiB
more than when it begins to load, as on a host that holds no more (mapped files do not count).
Without GPUs it runs on the CPU, to try it out.

The 70B takes 141 GB of ``/dev/shm``; with ``--layers N`` it takes about 4.2 + 1.71 N GB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from pytest_multigpu.model.config import ResolvedModel, resolve_config
from pytest_multigpu.model.loaded import LoadedModel, free_devices, release
from pytest_multigpu.model.loading import load_model
from pytest_multigpu.model.read_jobs import ReadJob
from pytest_multigpu.model.reader import ReadAhead
from pytest_multigpu.model.safetensors_index import checkpoint_files, read_headers
from pytest_multigpu.units import GIB

TIERS = ("16bit", "4bit", "8bit")
WRITERS = 16
SHARD_BYTES = 4_700_000_000
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "numpy")


# -- the model and where it goes ----------------------------------------------------------------


def resolved_model(name: str, layers: int | None) -> ResolvedModel:
    found = resolve_config(name)
    config = dict(found.config_dict)
    if layers is not None:
        config["num_hidden_layers"] = layers
    return ResolvedModel(name=f"{name} ({layers} layers)" if layers else name, config_dict=config)


def even_map(resolved: ResolvedModel) -> dict[str, int | str]:
    """Layers in equal runs over all GPUs, the same for both loaders; all on the CPU without."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2:
        return {"": 0 if gpus else "cpu"}
    layers = int(resolved.config_dict["num_hidden_layers"])
    places: dict[str, int | str] = {
        f"model.layers.{index}": index * gpus // layers for index in range(layers)
    }
    places.update({"model.embed_tokens": 0, "model.rotary_emb": 0})
    places.update({"model.norm": gpus - 1, "lm_head": gpus - 1})
    return places


def write_checkpoint(folder: Path, resolved: ResolvedModel) -> int:
    """A sharded bfloat16 checkpoint of synthetic tensors; bytes written."""
    import torch

    from pytest_multigpu.model.meta import build_meta_model
    from pytest_multigpu.model.synthetic import SyntheticWeights

    model = build_meta_model(resolved, tier="16bit", dtype="bfloat16").model
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    gpus = torch.cuda.device_count()
    devices = {
        name: torch.device("cuda", index % gpus) if gpus else torch.device("cpu")
        for index, name in enumerate(shapes)
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(resolved.config_dict)))
    plans = shard_plans(shapes)
    names = [f"model-{n:05d}-of-{len(plans):05d}.safetensors" for n in range(1, len(plans) + 1)]
    weight_map = {}
    work: list[tuple[int, str, int]] = []
    descriptors = []
    for file_name, plan in zip(names, plans, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        places = {}
        for name in plan:
            size = 2 * torch.Size(shapes[name]).numel()
            header[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [offset, offset + size],
            }
            places[name] = offset
            offset += size
            weight_map[name] = file_name
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        descriptor = os.open(folder / file_name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        descriptors.append(descriptor)
        os.ftruncate(descriptor, 8 + len(raw) + offset)
        os.pwrite(descriptor, len(raw).to_bytes(8, "little") + raw, 0)
        work += [(descriptor, name, 8 + len(raw) + places[name]) for name in plan]
    index = {
        "metadata": {"total_size": sum(2 * torch.Size(shape).numel() for shape in shapes.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with SyntheticWeights(shapes, dict.fromkeys(shapes, torch.bfloat16), devices) as weights:

        def write(item: tuple[int, str, int]) -> int:
            descriptor, name, offset = item
            data = weights.make(name).cpu().view(-1).view(torch.uint8).numpy()
            view, done = memoryview(data), 0
            while done < len(view):
                done += os.pwrite(descriptor, view[done : done + (64 << 20)], offset + done)
            return done

        with ThreadPoolExecutor(WRITERS) as pool:
            written = sum(pool.map(write, work))
    for descriptor in descriptors:
        os.close(descriptor)
    free_devices()
    return written


def shard_plans(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names in model order, in runs of at most :data:`SHARD_BYTES`."""
    plans: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        if plans[-1] and filled + size > SHARD_BYTES:
            plans.append([])
            filled = 0
        plans[-1].append(name)
        filled += size
    return plans


# -- measuring ----------------------------------------------------------------------------------


class HostMemory:
    """Largest rise of resident memory and fall of available memory while entered, sampled."""

    def __enter__(self) -> HostMemory:
        self._stop = threading.Event()
        self._first = self._now()
        self.resident_bytes = self.available_fall_bytes = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            resident, available = self._now()
            self.resident_bytes = max(self.resident_bytes, resident - self._first[0])
            self.available_fall_bytes = max(self.available_fall_bytes, self._first[1] - available)

    @staticmethod
    def _now() -> tuple[int, int]:
        """Anonymous resident bytes (mapped files are page cache), and MemAvailable."""
        return kernel_bytes("self/status", "RssAnon"), kernel_bytes("meminfo", "MemAvailable")


def kernel_bytes(name: str, key: str) -> int:
    """A figure of ``/proc/<name>``."""
    lines = Path("/proc", name).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def limit_host_memory(more_bytes: int) -> None:
    """From now on this process can allocate so much more, and no byte beyond it."""
    limit = kernel_bytes("self/status", "VmData") + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def one_load(
    resolved: ResolvedModel, tier: str, places: dict[str, int | str], weights: str, loader: str
) -> dict[str, Any]:
    loaded, report = timed_load(resolved, tier, places, weights, loader)
    release(loaded)
    return report


def timed_load(
    resolved: ResolvedModel, tier: str, places: dict[str, int | str], weights: str, loader: str
) -> tuple[LoadedModel, dict[str, Any]]:
    started = time.perf_counter()
    with HostMemory() as host:
        loaded = load_model(
            resolved,
            tier=tier,  # type: ignore[arg-type]
            device_map=places,
            weights=weights,  # type: ignore[arg-type]
            loader=loader,  # type: ignore[arg-type]
        )
    report = {
        "seconds": loaded.load.seconds,
        "call_seconds": time.perf_counter() - started,
        "loader": loaded.load.loader,
        "bytes": loaded.load.bytes,
        "notes": loaded.load.notes,
        "host_anonymous_rise_bytes": host.resident_bytes,
        "host_available_fall_bytes": host.available_fall_bytes,
        "peaks": {
            reading.device: [reading.allocated_bytes, reading.reserved_bytes]
            for reading in loaded.load.peaks.readings
        },
        "weights_bytes": {entry.device: entry.weights_bytes for entry in loaded.placement.devices},
    }
    return loaded, report


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for loader, of_loader in runs.items():
        if not of_loader:
            continue
        seconds = [run["seconds"] for run in of_loader]
        result[loader] = {
            "median_seconds": median(seconds),
            "seconds": seconds,
            "gb_per_second": of_loader[0]["bytes"] / 1e9 / median(seconds),
            "runs": of_loader,
        }
    if {"pytest-multigpu", "transformers"} <= result.keys():
        stock, ours = result["transformers"], result["pytest-multigpu"]
        result["stock_over_ours"] = stock["median_seconds"] / ours["median_seconds"]
    return result


def alternate(
    rounds: dict[str, int], measure: Callable[[str], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Loaders in turn, so that a machine that drifts treats both alike."""
    runs: dict[str, list[dict[str, Any]]] = {loader: [] for loader in rounds}
    for number in range(max(rounds.values())):
        for loader, wanted in rounds.items():
            if number < wanted:
                runs[loader].append(measure(loader))
                print(f"  {loader}: {runs[loader][-1]['seconds']:.2f} s", file=sys.stderr)
    return runs


# -- equality -----------------------------------------------------------------------------------


def every_tensor(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameters, statistics of quantisation and all buffers, plain ones included."""
    yield from model.state_dict().items()
    yield from model.named_buffers()


def compare(
    resolved: ResolvedModel, tier: str, places: dict[str, int | str], weights: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both loaders' models side by side on the same devices, tensor by tensor.

    :return: what was compared, and the report of the stock loader's run.
    """
    import torch

    ours, _ = timed_load(resolved, tier, places, weights, "pytest-multigpu")
    stock, report = timed_load(resolved, tier, places, weights, "transformers")
    mine, theirs = dict(every_tensor(ours.model)), dict(every_tensor(stock.model))
    different = [
        name
        for name, tensor in mine.items()
        if name not in theirs
        or tensor.dtype != theirs[name].dtype
        or tensor.device != theirs[name].device
        or not torch.equal(tensor, theirs[name])
    ]
    result = {
        "loaders": [ours.load.loader, stock.load.loader],
        "tensors": len(mine),
        "only_in_stock": sorted(set(theirs) - set(mine)),
        "different": different,
        "equal": not different and set(mine) == set(theirs),
    }
    del mine, theirs
    release(ours)
    release(stock)
    return result, report


# -- readers alone ------------------------------------------------------------------------------


def placed_jobs(folder: Path, places: dict[str, int | str]) -> list[ReadJob]:
    import torch
    from transformers.core_model_loading import dot_natural_key
    from transformers.integrations.accelerate import expand_device_map

    headers = read_headers(checkpoint_files(folder) or ())
    where = expand_device_map(dict(places), list(headers))
    return [
        ReadJob(
            stored=headers[name],
            device=torch.device("cuda", where[name])
            if isinstance(where[name], int)
            else torch.device(where[name]),
            quantised=False,
        )
        for name in sorted(headers, key=dot_natural_key)
    ]


def read_bare(folder: Path, places: dict[str, int | str]) -> None:
    """This package's reader and nothing else: what loading can reach at best."""
    held: list[Any] = []
    jobs = placed_jobs(folder, places)
    with ReadAhead(jobs) as reader:
        reader.start()
        held.extend(reader.pending(job)[...] for job in jobs)


def read_host_only(folder: Path, _: dict[str, int | str]) -> None:
    """16 threads of pread into buffers that are thrown away: what the storage gives."""
    work = [
        (path, start)
        for path in sorted(folder.glob("*.safetensors"))
        for start in range(0, path.stat().st_size, 64 << 20)
    ]
    local = threading.local()

    def read(item: tuple[Path, int]) -> None:
        path, start = item
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(64 << 20)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.preadv(descriptor, [local.buffer], start)
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, work))


def read_runai(folder: Path, places: dict[str, int | str]) -> None:
    os.environ.setdefault("RUNAI_STREAMER_CONCURRENCY", "16")
    from runai_model_streamer import (  # type: ignore[import-not-found,unused-ignore]
        SafetensorsStreamer,
    )

    where = {job.stored.name: job.device for job in placed_jobs(folder, places)}
    held: list[Any] = []
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in sorted(folder.glob("*.safetensors"))])
        for name, tensor in streamer.get_tensors():
            held.append(tensor.to(where[name], copy=True))


def read_fastsafetensors(folder: Path, places: dict[str, int | str]) -> None:
    """One loader a GPU, each with the shards whose first tensor belongs there."""
    from fastsafetensors import SafeTensorsFileLoader

    jobs = placed_jobs(folder, places)
    where = {job.stored.name: job.device for job in jobs}
    files: dict[Any, list[str]] = {}
    for path in dict.fromkeys(job.stored.path for job in jobs):
        first = next(job for job in jobs if job.stored.path == path)
        files.setdefault(first.device, []).append(path)
    held: list[Any] = []

    def read(item: tuple[Any, list[str]]) -> None:
        device, paths = item
        for path in paths:
            loader = SafeTensorsFileLoader(None, str(device), nogds=True, max_threads=16)
            loader.add_filenames({0: [path]})
            buffer = loader.copy_files_to_device()
            try:
                for name in loader.get_keys():
                    held.append(buffer.get_tensor(name).to(where[name], copy=True))
            finally:
                buffer.close()
                loader.close()

    with ThreadPoolExecutor(max(1, len(files))) as pool:
        list(pool.map(read, files.items()))


READERS = {
    "host only": read_host_only,
    "own reader": read_bare,
    "runai-model-streamer": read_runai,
    "fastsafetensors": read_fastsafetensors,
}


def measure_reader(name: str, folder: Path, places: dict[str, int | str]) -> dict[str, Any]:
    import torch

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    started = time.perf_counter()
    READERS[name](folder, places)
    if torch.cuda.is_available():
        for index in {place for place in places.values() if isinstance(place, int)}:
            torch.cuda.synchronize(index)
    seconds = time.perf_counter() - started
    free_devices()
    return {"seconds": seconds, "bytes": size}


# -- the command --------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    import torch

    versions = {}
    for package in (*PACKAGES, "fastsafetensors", "runai-model-streamer"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


@contextmanager
def checkpoint(options: argparse.Namespace, resolved: ResolvedModel) -> Iterator[Path]:
    folder = Path(options.folder)
    if (folder / "model.safetensors.index.json").is_file():
        yield folder  # given by hand, and left there
        return
    print(f"writing the checkpoint into {folder}", file=sys.stderr)
    try:
        write_checkpoint(folder, resolved)
        yield folder
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.3-70b")
    parser.add_argument("--layers", type=int, help="a shallower model of the same width")
    parser.add_argument("--folder", default="/dev/shm/pytest-multigpu-load")  # noqa: S108
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=TIERS)
    parser.add_argument("--rounds", type=int, default=3, help="of this package's loader")
    parser.add_argument("--stock-rounds", type=int, default=3, help="of transformers'; 0 skips it")
    parser.add_argument("--synthetic-rounds", type=int, default=3, help="0 skips synthesising")
    parser.add_argument("--no-checkpoint", action="store_true", help="only synthesise")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=(),
        choices=("checkpoint", "synthetic"),
        help="bit-equality of both loaders",
    )
    parser.add_argument("--readers", action="store_true", help="maintained readers as well")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each run")
    parser.add_argument("--host-limit", type=float, metavar="GIB", help="of more host memory")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--json", type=Path, help="write the result there too")
    options = parser.parse_args()

    import torch

    resolved = resolved_model(options.model, options.layers)
    places = even_map(resolved)
    result: dict[str, Any] = {
        "model": resolved.name,
        "settings": {key: str(value) for key, value in vars(options).items()},
        **environment(),
    }
    for index in range(torch.cuda.device_count()):
        torch.zeros(1, device=f"cuda:{index}")  # contexts are not what is measured

    def record(section: str, key: str, value: Any) -> None:
        result.setdefault(section, {})[key] = value
        if options.json:  # what is known survives a run that is cut short
            options.json.write_text(json.dumps(result, indent=1, default=str))

    one_load(resolved, options.tiers[0], places, "synthetic", "auto")  # imports and kernels
    if options.synthetic_rounds:
        for tier in options.tiers:
            print(f"synthesised, {tier}", file=sys.stderr)
            rounds = {"pytest-multigpu": options.synthetic_rounds}
            runs = alternate(rounds, partial(one_load, resolved, tier, places, "synthetic"))
            record("synthesised", tier, summary(runs))
            if "synthetic" in options.compare:
                record("synthesised_equal", tier, compare(resolved, tier, places, "synthetic")[0])
    if not options.no_checkpoint:
        with checkpoint(options, resolved) as folder:
            on_disk = resolve_config(str(folder))
            measure_all(options, on_disk, folder, places, record)
    print(json.dumps(result, indent=1, default=str))
    equal = [
        entry["equal"]
        for section in ("synthesised_equal", "checkpoint_equal")
        for entry in result.get(section, {}).values()
    ]
    return 0 if all(equal) else 1


def measure_all(
    options: argparse.Namespace,
    on_disk: ResolvedModel,
    folder: Path,
    places: dict[str, int | str],
    record: Callable[[str, str, Any], None],
) -> None:
    if options.host_limit is not None:
        limit_host_memory(round(options.host_limit * GIB))

    def prepared() -> None:
        gc.collect()
        if options.cold:
            drop_from_cache(folder)

    def load(tier: str, loader: str) -> dict[str, Any]:
        prepared()
        return one_load(on_disk, tier, places, "checkpoint", loader)

    names = list(READERS) if options.readers else ["host only", "own reader"]
    for name in names:
        print(name, file=sys.stderr)
        try:
            times = []
            for _ in range(options.rounds):
                prepared()
                times.append(measure_reader(name, folder, places))
        except Exception as error:  # a reader that fails is a finding, not the end
            record("readers", name, {"failed": f"{type(error).__name__}: {error}"[:300]})
            free_devices()
            continue
        middle = median(run["seconds"] for run in times)
        record(
            "readers",
            name,
            {"seconds": times, "gb_per_second": times[0]["bytes"] / 1e9 / middle},
        )
    for tier in options.tiers:
        print(f"checkpoint, {tier}", file=sys.stderr)
        # The stock loader takes minutes: the run that is compared is its last round, or its only.
        compared = "checkpoint" in options.compare
        stock_rounds = options.stock_rounds - compared
        rounds = {"pytest-multigpu": options.rounds, "transformers": max(0, stock_rounds)}
        runs = alternate(rounds, partial(load, tier))
        record("checkpoint", tier, summary(runs))
        if compared:
            prepared()
            equal, stock = compare(on_disk, tier, places, "checkpoint")
            runs["transformers"].append(stock)
            record("checkpoint_equal", tier, equal)
            record("checkpoint", tier, summary(runs))


if __name__ == "__main__":
    raise SystemExit(main())
