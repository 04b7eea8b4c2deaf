"""What benchmarks share: arguments, hardware and versions, JSON, pytest without other plugins, GPU
memory that another process holds."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ALONE = ("-p", "pytest_multigpu.plugin", "-p", "pytest_timeout")
NO_OTHERS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""Arguments and environment of pytest: the plugins of an image are nothing of ours."""


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", default="llama-3.3-70b")
    made.add_argument("--tier", default="16bit", choices=["cpu", "4bit", "8bit", "16bit"])
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--out", type=Path, required=True)
    return made


def spread(layers: int, gpus: int) -> dict[str, int | str]:
    """An even device map of a Llama: the embedding first, norm and head last; 0 GPUs: the CPU."""
    if gpus == 0:
        return {"": "cpu"}
    if gpus == 1:
        return {"": 0}
    return {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        **{f"model.layers.{i}": i * gpus // layers for i in range(layers)},
        "model.norm": gpus - 1,
        "lm_head": gpus - 1,
    }


def load(arguments: argparse.Namespace, gpus: int) -> Any:
    """The model with synthesised weights over that many GPUs; 0: the CPU."""
    from pytest_multigpu.model.config import resolve_config
    from pytest_multigpu.model.loading import load_model

    resolved = resolve_config(arguments.model)
    layers = int(resolved.config_dict["num_hidden_layers"])  # type: ignore[call-overload]
    return load_model(
        resolved, tier=arguments.tier, device_map=spread(layers, gpus), weights="synthetic"
    )


@contextmanager
def held_by_another(script: str, *arguments: object) -> Iterator[None]:
    """Another process that holds memory of the GPUs.

    :param script: Python; says ``holding`` once it does, and ends when its stdin does.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "holding":
            raise SystemExit("the memory could not be held")
        yield
    finally:
        process.kill()
        process.wait()


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def summary(seconds: list[float]) -> dict[str, Any]:
    return {"median": median(seconds), "all": seconds}


def write(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    everything = {
        "model": arguments.model,
        "tier": arguments.tier,
        "hardware": gpus or [platform.processor() or platform.machine()],
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        **results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(everything, indent=2) + "\n")
    print(json.dumps(everything))
