"""The faults that are planted on real GPUs, and the runs without a fault.

Real processes, real copies, real loads; only what no test can bring about on purpose (a broken
link, a slow card) is planted in the worker by ``tests/support/faulty_worker.py``. The built-in tiny
model, spread over all GPUs, stands for the 70B: what is planted are faults, not sizes. Faults that
time the GPUs or fill them run alone.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import fault_files as files
from benchmarks.fault import Fault, NotHereError, Plant
from pytest_multigpu.machine.nvml import read_machine

MACHINE = read_machine({})
GPUS = len(MACHINE.gpus)
LAST = GPUS - 1
HELD = min(2, LAST)
GIB = 1 << 30
HOG = """
import sys, torch
held = torch.empty(int(sys.argv[2]), dtype=torch.uint8, device=f"cuda:{sys.argv[1]}")
torch.cuda.synchronize(int(sys.argv[1]))
print("holding", flush=True)
sys.stdin.read()
"""


def hog(gpu: int, size_bytes: int) -> Callable[[Path], contextlib.AbstractContextManager[None]]:
    """Another process that holds memory of one GPU meanwhile."""

    @contextlib.contextmanager
    def around(_folder: Path) -> Iterator[None]:
        command = [sys.executable, "-c", HOG, str(gpu), str(size_bytes)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                if process.stdout.readline().strip() != b"holding":
                    raise NotHereError(f"nothing could be allocated on GPU {gpu}")
                yield
            finally:
                process.stdin.close()  # it ends, and with it what it holds
                process.wait(timeout=60)

    return around


def held_bytes() -> int:
    """40 GiB, but no less than 0.3 and no more than 0.6 of the card."""
    total = MACHINE.gpus[HELD].total_bytes if GPUS else 0
    return min(max(40 * GIB, total * 3 // 10), total * 6 // 10)


def spread(folder: Path) -> None:
    """The tiny model's six layers over all GPUs."""
    blocks: dict[str, int] = {f"model.layers.{i}": i * GPUS // 6 for i in range(6)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": LAST, "lm_head": LAST}
    (folder / "map.json").write_text(json.dumps({**ends, **blocks}))


def alone(name: str, reason: str, *plants: Plant, **more: Any) -> Fault:
    return Fault(name=name, issue=3, reason=reason, plants=plants, alone=True, **more)


def worker(name: str, reason: str, seconds: float | None = None, **more: Any) -> Fault:
    plant = ("worker", {"fault": more.pop("fault"), "seconds": seconds})
    return alone(name, reason, plant, args=more.pop("args", "-k test_interconnect"), **more)


def visible(name: str, value: str, reason: str, **more: Any) -> Fault:
    return Fault(
        name=f"CUDA_VISIBLE_DEVICES {name}",
        issue=3,
        reason=reason,
        env={"CUDA_VISIBLE_DEVICES": value},
        # What CUDA itself sees is compared as well: both must read the variable alike.
        args="-k 'test_gpus or test_visibility'",
        **more,
    )


TINY = "--gpu-tier=16bit --gpu-model=tiny-llama --gpu-placement={folder}/map.json"


def model(name: str, reason: str, *plants: Plant, issue: int = 2, **more: Any) -> Fault:
    args = f"{TINY} {more.pop('args')}"
    return Fault(
        name=name, issue=issue, reason=reason, plants=plants, args=args, prepare=spread, **more
    )


def shard(name: str, reason: str, change: Callable[[Path], object]) -> Fault:
    return Fault(
        name=f"checkpoint: {name}",
        issue=3,
        reason=reason,
        prepare=files.damaged(change),
        args="-k test_checkpoint_and_disk --gpu-model={checkpoint}",
    )


def uuid(index: int) -> str:
    return MACHINE.gpus[index].uuid


COPY = r"bytes differ \({}\)"
HIDDEN = (r"needs 1 GPU; found no visible GPU",)
BROKEN = (
    r"GPU 0 -> GPU 1: [\d,]+ of 67,108,864 bytes differ \({}\)",
    r"first wrong after (.* -> )?GPU 0 -> GPU 1;",
)


def pair(name: str, how: str, kind: str) -> Fault:
    fault = {"kind": "copy", "pair": [0, 1], "how": how}
    return worker(name, BROKEN[0].format(kind), fault=fault, also=(BROKEN[1],))


ONE = [
    alone(
        f"{held_bytes() // GIB} GiB held on GPU {HELD}",
        rf"GPU {HELD} .*held by",
        args="-m quick --gpu-wait=1",
        around=hog(HELD, held_bytes()),
    ),
    alone(
        "NVML missing beside device files",
        r"libnvidia-ml\.so\.1 is missing although /dev has 4 NVIDIA GPUs",
        ("no_nvml", {}),
        args="-m quick",
        also=(r"have no GPU to go to", r"and 0 fit", r"could not be asked"),
    ),
    worker(
        "host copy changes a byte",
        r"67,108,864 bytes from the host arrived changed on GPU 0",
        fault={"kind": "upload", "gpu": 0},
        also=(r"GPU 0.*",),
    ),
    worker(
        "GPU raises while computing",
        r"the CUDA worker failed at step 'arithmetic' on GPU 0: RuntimeError: CUDA error",
        fault={"kind": "raise", "at": "matmul", "gpus": [0]},
    ),
    worker(
        "worker killed making a context",
        r"the CUDA worker died \(SIGKILL\) at step 'contexts' on (.*, )?GPU 0",
        fault={"kind": "kill", "at": "open", "gpus": [0]},
    ),
    worker(
        "worker hangs making a context",
        rf"the CUDA worker hung at step 'contexts' on GPU {LAST}; killed after 20 s",
        seconds=20.0,
        fault={"kind": "hang", "at": "open", "gpus": [LAST]},
        limit=60.0,
    ),
    worker(
        "no room for the copies, strict",
        r"not measured: GPU 0 has 1 MiB free",
        fault={"kind": "full", "gpu": 0},
        args="-k test_interconnect --gpu-strict",
        also=(r"not measured", r"^test_"),
    ),
    visible("empty", "", r"CUDA_VISIBLE_DEVICES is empty, which hides", also=HIDDEN),
    visible("negative", "-1", r"entry '-1' is negative", also=HIDDEN),
    visible("garbage", "gpu0", r"entry 'gpu0' is not a GPU index", also=HIDDEN),
    visible("repeated", "0,0", r"entry '0' is repeated: CUDA then sees no GPU", also=HIDDEN),
    visible("out of range", f"0,{GPUS + 3}", rf"entry '{GPUS + 3}' names no GPU", alone=True),
    visible("unknown UUID", "GPU-00000000", r"'GPU-00000000' names no GPU", also=HIDDEN),
    visible("MIG instance", "MIG-1", r"names MIG instances", also=HIDDEN),
    shard(
        "shard missing",
        r"model-00002-of-00003\.safetensors is missing",
        lambda where: (where / files.SHARD).unlink(),
    ),
    shard("shard truncated", r"00002-of-00003\.safetensors is truncated", files.cut),
    shard("shard padded", r"00002-of-00003\.safetensors is padded", files.pad),
    shard(
        "index names a missing file",
        r"model-00004-of-00004\.safetensors is missing",
        files.rename_in_index,
    ),
    Fault(
        name="truncated shard, loaded",
        issue=2,
        reason=r"model-00002-of-00003\.safetensors is truncated",
        prepare=files.damaged(files.cut),
        args="-k 'test_checkpoint_and_disk or test_distribution' --gpu-model={checkpoint}",
        also=(r"model-00002-of-00003\.safetensors",),
    ),
    Fault(
        name="disk full",
        issue=3,
        reason=r"the checkpoint needs .* at .*/small/checkpoint; found 0 B free",
        line=r"00002-of-00003\.safetensors is missing",
        around=files.small_disk,
        prepare=files.fill_disk,
        args="-k test_checkpoint_and_disk --gpu-model={checkpoint}",
        also=(r"is missing",),
    ),
    Fault(
        name="one GPU for 16 bit",
        issue=2,
        reason=r"\d+ blocks would go to the CPU: model\.layers\.\d+",
        env={"CUDA_VISIBLE_DEVICES": "0"},
        args="-k test_plan.py --gpu-tier=16bit",
        exit=1 if GPUS and MACHINE.gpus[0].total_bytes > 145e9 else 10,
        also=(r"the plan puts model\.layers", r"and 0 fit"),
    ),
    Fault(
        name="device map puts layers on the CPU",
        issue=2,
        reason=r"1 block would go to the CPU: model\.layers\.5",
        prepare=files.text(map__json='{"": 0, "model.layers.5": "cpu"}'),
        args="-k test_plan.py --gpu-tier=16bit --gpu-model=tiny-llama "
        "--gpu-placement={folder}/map.json",
        also=(r"the plan puts model\.layers\.5 on cpu", r"and 0 fit"),
    ),
    Fault(
        name="device map names a GPU that is not there",
        issue=2,
        reason=rf"map\.json: model\.layers\.5 is on GPU {GPUS}, but CUDA sees",
        prepare=files.text(map__json=json.dumps({"": 0, "model.layers.5": GPUS})),
        args="-k test_plan.py --gpu-placement={folder}/map.json --gpu-model=tiny-llama",
        exit=4,
    ),
    model(
        "out of memory while loading",
        rf"GPU {LAST}: out of memory while loading",
        ("fill", {"gpu": LAST}),
        args="-k test_parameters_lie",
        alone=True,
    ),
    model(
        "loading hangs",
        r"Timeout",
        ("load", {"how": "hang"}),
        args="-k test_parameters_lie --timeout=40",
        issue=6,
    ),
    model(
        "killed while loading",
        r"test_parameters_lie_where_planned",
        ("load", {"how": "kill"}),
        args="-k test_parameters_lie",
        issue=6,
        killed=True,
        exit=-9,
    ),
    model(
        "killed while generating",
        r"test_greedy_generation",
        ("generation", {"how": "kill"}),
        args="-k test_greedy_generation",
        issue=6,
        killed=True,
        exit=-9,
    ),
    model(
        "noise at every pass",
        r"two greedy generations of the same prompt differ",
        ("layer", {"layer": 2, "how": "noise"}),
        args="-k test_greedy_generation",
        also=(r"tokens differ from an uncached forward",),
    ),
    model(
        f"NaN on GPU {LAST}",
        rf"hidden_states\[\d\] on GPU {LAST} is not finite",
        ("layer", {"gpu": LAST, "how": "nan"}),
        args="-k test_activations",
        issue=5,
    ),
    model(
        f"activations zeroed on GPU {LAST}",
        rf"hidden_states\[\d\] on GPU {LAST} is zero",
        ("layer", {"gpu": LAST, "how": "zero"}),
        args="-k test_activations",
        issue=5,
    ),
    model(
        "off-by-one layer",
        r"the scorer's activations at site raw are not hidden_states\[2\]",
        ("scorer", {"mistake": "off by one"}),
        args="-k test_hook_equals",
        issue=5,
    ),
    model(
        "hook on a moved module",
        r"the hook on hidden_states\[2\] never ran",
        ("scorer", {"mistake": "moved module"}),
        args="-k 'test_hook_equals or test_scored_tokens'",
        issue=5,
        also=(r"never ran",),
    ),
    model(
        "exception in the scorer",
        r"scoring failed: RuntimeError: mat1 and mat2",
        ("scorer", {"mistake": "broken"}),
        args="-k 'test_scored_tokens or test_by_way'",
        issue=5,
    ),
]

SEVERAL = [
    pair("pair delivers zeros", "zero", "all zero"),
    pair("pair delivers stale bytes", "stale", "stale"),
    pair("pair changes bytes", "noise", "mixed"),
    worker(
        "chain corrupts, pairs are fine",
        r"GPU 0 -> .*\(all zero\).*first wrong after (.* -> )?GPU \d -> GPU 0;",
        fault={"kind": "chain", "pair": [LAST, 0], "how": "zero"},
        also=(rf"first wrong after (.* -> )?GPU {LAST} -> GPU 0;",),
    ),
    worker(
        "GPU computes wrong bits",
        rf"GPU {LAST} (has other bits than|is .* off the CPU's)|GPU 0 has other bits",
        fault={"kind": "product", "gpu": LAST},
    ),
    worker(
        "slow sibling",
        rf"GPU {LAST} reaches .*, its siblings .*: below 80% of them",
        fault={"kind": "slow", "gpu": LAST, "times": 3},
        line=rf"NOT READY: GPU {LAST} ",
        also=(rf"GPU {LAST} .*(siblings|same link|datasheet)",),
    ),
    worker(
        "worker killed at a copy",
        r"the CUDA worker died \(SIGKILL\) at step 'copies' on GPU 0 -> GPU 1",
        fault={"kind": "kill", "at": "copy_into", "gpus": [0, 1]},
    ),
    worker(
        "worker hangs at a copy",
        rf"the CUDA worker hung at step 'copies' on GPU {LAST} -> GPU 0; killed after 20 s",
        seconds=20.0,
        fault={"kind": "hang", "at": "copy_into", "gpus": [LAST, 0]},
        limit=60.0,
    ),
    visible("prefix alone", "GPU-", r"'GPU-' names no GPU", also=HIDDEN),
    model(
        "activations change between GPUs",
        r"GPU 0 -> GPU 1: hidden_states\[\d\] changes on its way",
        ("boundary", {"gpu": 1}),
        args="-k test_activations",
        issue=5,
    ),
    model(
        "a layer on another GPU than planned",
        r"model\.layers\.0 on GPU 1",
        ("map", {"device_map": {"": 0, "model.layers.0": 1}}),
        args="-k test_parameters_lie",
        also=(r"model\.layers",),
    ),
]

FAULTS = [*(ONE if GPUS else []), *(SEVERAL if GPUS > 1 else [])]


def _healthy(name: str, args: str, **more: Any) -> Fault:
    return Fault(name=f"healthy: {name}", issue=6, reason="", exit=0, args=args, alone=True, **more)


HEALTHY = [
    _healthy("quick", "-m quick"),
    _healthy("quick, 8 bit", "-m quick --gpu-tier=8bit"),
    _healthy(
        "quick, reversed",
        "-m quick",
        env={"CUDA_VISIBLE_DEVICES": ",".join(str(i) for i in reversed(range(GPUS)))},
    ),
    _healthy(
        "quick, by UUID",
        "-m quick",
        env={"CUDA_VISIBLE_DEVICES": ",".join(uuid(i) for i in range(GPUS))},
    ),
    _healthy("all checks, tiny model on all GPUs", TINY, prepare=spread),
]
