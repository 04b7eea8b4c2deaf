"""The faults that are planted on the CPU, and the runs without a fault.

A fake machine with four H100s (``machine/fake.py``) and the worker on CPU stand-ins where GPUs are
needed; the cpu tier's model where a model is. Planting is in ``tests/support/plant.py``.
"""

from __future__ import annotations

from typing import Any

from benchmarks import fault_files as files
from benchmarks.fault import Fault, Plant
from benchmarks.fault_selections import SELECTIONS

GIB = 1 << 30
H100 = 85_520_809_984
GAMING = {
    "name": "NVIDIA GeForce RTX 4090",
    "total": 25_757_220_864,
    "capability": [8, 9],
    "nvlinks": [],
    "errors": dict.fromkeys(
        (
            "nvmlDeviceGetEccMode",
            "nvmlDeviceGetTotalEccErrors",
            "nvmlDeviceGetRemappedRows",
            "nvmlDeviceGetMigMode",
        ),
        3,
    ),
}
"""A card without ECC: NVML answers "not supported"."""
RTX_3090 = {"name": "NVIDIA GeForce RTX 3090", "total": 25_757_220_864, "capability": [8, 6]}
KILLED = 4_000_000
"""A process id that is no process's."""
MODEL = "--gpu-tier=cpu"
MINE = "--gpu-tier=cpu -p no:randomly {folder}"


def nvml(**options: Any) -> Plant:
    return ("nvml", options)


def worker(seconds: float | None = None, **fault: Any) -> tuple[Plant, ...]:
    return (nvml(), ("worker", {"fault": fault, "seconds": seconds}))


def gpu(index: int, **fields: Any) -> Plant:
    return nvml(change={str(index): fields})


def machine(name: str, reason: str, *plants: Plant, issue: int = 3, **more: Any) -> Fault:
    return Fault(name=name, issue=issue, reason=reason, plants=plants or (nvml(),), **more)


def visible(name: str, value: str, reason: str, **more: Any) -> Fault:
    return machine(
        f"CUDA_VISIBLE_DEVICES {name}", reason, env={"CUDA_VISIBLE_DEVICES": value}, **more
    )


def copy(name: str, reason: str, seconds: float | None = None, **more: Any) -> Fault:
    fault = more.pop("fault")
    return Fault(name=name, issue=3, reason=reason, plants=worker(seconds, **fault), **more)


def model(name: str, reason: str, *plants: Plant, issue: int = 2, **more: Any) -> Fault:
    args = f"{MODEL} {more.pop('args', '')}"
    return Fault(name=name, issue=issue, reason=reason, plants=plants, args=args, **more)


def probe(name: str, reason: str, *plants: Plant, **more: Any) -> Fault:
    return model(name, reason, *plants, issue=5, args=f"-k probe {more.pop('args', '')}", **more)


def shard(name: str, reason: str, change: Any, **more: Any) -> Fault:
    args = f"{MODEL} -m quick --gpu-model={{checkpoint}}"
    return Fault(
        name=f"checkpoint: {name}",
        issue=3,
        reason=reason,
        prepare=files.damaged(change),
        args=more.pop("args", args),
        **more,
    )


NO_GPU_LEFT = (
    r"of weights have no GPU to go to",
    r"were asked for and 0 fit",
    r"the GPUs could not be asked",
)
UNASKED = (r"torch sees no GPU", r"CUDA was not asked")
UNMEASURED = r"^test_(copies|chained_copies|arithmetic);"
"""The checks that READY rests on, where CUDA could measure nothing."""
OTHER_COPIES = r"bytes differ \((all zero|stale|mixed)\)"

MACHINE = [
    machine(
        "no GPU",
        r"this machine has no NVIDIA GPU; rent",
        nvml(gpus=0),
        issue=2,
        exit=10,
        also=NO_GPU_LEFT,
        fast=True,
    ),
    machine(
        "NVML missing beside device files",
        r"libnvidia-ml\.so\.1 is missing although /dev has 4 NVIDIA GPUs",
        ("no_nvml", {}),
        also=NO_GPU_LEFT,
    ),
    machine(
        "nvidia-ml-py missing",
        r"nvidia-ml-py cannot be imported .*pip install nvidia-ml-py",
        ("no_binding", {}),
        also=NO_GPU_LEFT,
    ),
    machine(
        "driver and library differ",
        r"driver and its library have different versions: reboot",
        nvml(errors={"nvmlInit": 18}),
        also=NO_GPU_LEFT,
    ),
    machine(
        "NVML hangs",
        r"NVML did not answer within 2 s while counting the GPUs",
        nvml(hang="nvmlDeviceGetCount"),
        also=NO_GPU_LEFT,
        limit=30.0,
    ),
    machine(
        "GPU lost before the run",
        r"GPU 2 cannot be read: GPU is lost",
        nvml(lose=[2], unseen=[2]),
        also=(r"CUDA does not see GPU 2;",),
    ),
    machine(
        "GPU lost midway",
        r"GPU 1 cannot be read: GPU is lost",
        nvml(lose_later={"nvmlDeviceGetCurrentClocksEventReasons": 1}),
    ),
    machine(
        "NVML answers an unknown error for one GPU",
        r"GPU 3 cannot be read: Unknown Error",
        gpu(3, errors={"nvmlDeviceGetMemoryInfo_v2": 999}),
        also=(r"GPU 3.*",),
    ),
    machine(
        "uncorrected ECC error",
        r"GPU 1: 2 uncorrected ECC errors since the driver was loaded",
        gpu(1, ecc=(2, 2)),
        fast=True,
    ),
    machine(
        "row waits to be remapped", r"GPU 3: .*waits for a reset", gpu(3, remapped=(0, 0, 1, 0))
    ),
    machine(
        "row could not be remapped", r"GPU 0: .*not be remapped", gpu(0, remapped=(0, 0, 0, 1))
    ),
    machine("thermal slowdown", r"GPU 2: hardware thermal slowdown", gpu(2, reasons=0x40)),
    machine("power brake", r"GPU 2: hardware power brake", gpu(2, reasons=0x80)),
    machine(
        "PCIe at x4",
        r"GPU 1: PCIe link at x4 of x16, generation 5 of 5: 13\.5 GB/s from the host, at most 25%",
        gpu(1, pcie=(5, 5, 4, 16)),
        ("worker", {"fault": {"kind": "narrow", "gpu": 1, "times": 4}}),
        also=(
            r"GPU 1 reaches 13\.5 GB/s, its siblings 54\.0 GB/s: below 40% of them; its PCIe link "
            r"ran at x4 of x16, generation 5 of 5; its siblings at x16 of x16",
        ),
    ),
    machine(
        "NVLinks down",
        r"GPU 3: 16 of 18 NVLinks up; a sibling has 18",
        gpu(3, nvlinks=[True] * 16 + [False] * 2),
    ),
    machine("MIG on", r"GPU 0: MIG is on", gpu(0, mig=True)),
    machine(
        "driver too old",
        r"driver 450\.80\.02 serves CUDA 11\.0; torch 2\.11\.0\+cu128 needs 12\.8",
        nvml(driver="450.80.02", cuda=11000),
    ),
    machine(
        "torch without CUDA",
        r"torch 2\.11\.0\+cpu is a CPU build",
        nvml(torch=["2.11.0+cpu", None]),
    ),
    machine(
        "no kernels for this architecture",
        r"GPU [0-3] \(NVIDIA H100 80GB HBM3\) is sm_90; this torch has sm_70, sm_80",
        nvml(arch_list=["sm_70", "sm_80"]),
    ),
    machine(
        "CUDA does not start",
        r"CUDA could not be initialised: Error 802: system not yet initialized; "
        r"systemctl start nvidia-fabricmanager",
        nvml(start_error="Error 802: system not yet initialized"),
        also=(r"not measured: .*Error 802", r"CUDA does not see GPU 0", UNMEASURED),
    ),
    machine(
        "CUDA sees three of four",
        r"CUDA does not see GPU 3",
        nvml(unseen=[3]),
        fast=True,
    ),
    machine(
        "gaming cards under strict",
        r"this card has no ECC, so that nobody counts its memory's errors; gate such cards without "
        r"--gpu-strict: README, Consumer cards",
        nvml(gpus=2, change={"0": GAMING, "1": GAMING}),
        args="-m quick --gpu-strict --gpu-tier=4bit --gpu-placement=balanced",
        also=(r"remapped rows", r"^test_"),
    ),
    machine(
        "mixed cards, CUDA does not tell their order",
        r"mixed GPUs, which CUDA numbers by speed, and CUDA could not be asked: CUDA error 999: "
        r"the plan may be for other cards; export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        nvml(change={"0": RTX_3090}, by_speed=[1, 2, 3, 0], driver_order=False),
        also=(r"CUDA numbers mixed GPUs otherwise than the plan",),
    ),
    machine(
        "container promises more",
        r"NVIDIA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7: 8 GPUs asked for, NVML lists 4",
        env={"NVIDIA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
        exit=10,
    ),
    machine(
        "pod promises more",
        r"RUNPOD_GPU_COUNT=8, but NVML lists 4",
        env={"RUNPOD_GPU_COUNT": "8"},
        exit=10,
    ),
    machine(
        "40 GiB held on GPU 2",
        r"GPU 2 has 39\.2 GiB of 79\.6 GiB free after waiting 1 s: 40\.0 GiB held by "
        r"a process \(PID 4000000, 40\.0 GiB\)",
        gpu(2, used=40 * GIB, processes={str(KILLED): 40 * GIB}),
        args="-m quick --gpu-wait=1",
    ),
    machine(
        "memory held by nobody visible",
        r"GPU 1 .*70\.0 GiB held by a holder that is not visible from here",
        gpu(1, used=70 * GIB),
        args="-m quick --gpu-wait=0 --gpu-tier=16bit",
        also=(r"GPU 1 lacks", r"were asked for and \d+ fit"),
        issue=2,
    ),
    machine(
        "a desktop's memory beside a model that is too large",
        r"of weights|would go to the CPU|lacks|refuses",
        nvml(gpus=1, change={"0": RTX_3090 | {"used": GIB + GIB // 5}}),
        args="-m quick --gpu-wait=5",
        also=(r"were asked for and 0 fit", r"nothing is placed", r"the plan puts"),
        exit=10,
        limit=60.0,
    ),
    visible(
        "empty", "", r"CUDA_VISIBLE_DEVICES is empty, which hides all 4 GPUs", also=NO_GPU_LEFT
    ),
    visible("negative", "-1", r"entry '-1' is negative", also=NO_GPU_LEFT),
    visible("garbage", "gpu0", r"entry 'gpu0' is not a GPU index", also=NO_GPU_LEFT),
    visible(
        "repeated",
        "0,1,0",
        r"entry '0' is repeated: CUDA then sees no GPU at all; export CUDA_VISIBLE_DEVICES=0,1",
        also=NO_GPU_LEFT,
    ),
    visible(
        "with semicolons",
        "0;1",
        r"entry '0;1' is read as 0: CUDA knows only commas between GPUs; "
        r"export CUDA_VISIBLE_DEVICES=0,1",
        args="-m quick --gpu-tier=4bit",
    ),
    machine(
        "CUDA_DEVICE_ORDER with a typing error",
        r"CUDA_DEVICE_ORDER=pci_bus_id is no value that CUDA knows, and it does not start; "
        r"export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        env={"CUDA_DEVICE_ORDER": "pci_bus_id"},
    ),
    visible("out of range", "0,7", r"entry '7' names no GPU", fast=True),
    visible("unknown UUID", "GPU-ffffffff", r"'GPU-ffffffff' names no GPU", also=NO_GPU_LEFT),
    visible("ambiguous prefix", "GPU-0000", r"'GPU-0000' fits 4 GPUs", also=NO_GPU_LEFT),
    visible("MIG instance", "MIG-1", r"names MIG instances", also=NO_GPU_LEFT),
    visible(
        "one GPU for 16 bit",
        "2",
        r"\d+ blocks would go to the CPU: model\.layers\.4\d.*--gpu-tier=8bit",
        args="-m quick --gpu-tier=16bit",
        exit=10,
        also=(r"the plan puts model\.layers\.4\d", r"were asked for and 0 fit"),
    ),
]

COPIES = [
    copy(
        "pair delivers zeros",
        r"GPU 1 -> GPU 2: [\d,]+ of 1,048,576 bytes differ \(all zero\)",
        fault={"kind": "copy", "pair": [1, 2], "how": "zero"},
        also=(
            r"-> GPU 1 -> GPU 2.*first wrong after GPU 1 -> GPU 2;",
            r"first wrong after .*GPU 1 -> GPU 2;",
        ),
        fast=True,
    ),
    copy(
        "pair delivers stale bytes",
        r"GPU 3 -> GPU 0: [\d,]+ of 1,048,576 bytes differ \(stale\)",
        fault={"kind": "copy", "pair": [3, 0], "how": "stale"},
        also=(r"first wrong after .*GPU 3 -> GPU 0;",),
    ),
    copy(
        "pair changes bytes",
        r"GPU 0 -> GPU 3: [\d,]+ of 1,048,576 bytes differ \(mixed\)",
        fault={"kind": "copy", "pair": [0, 3], "how": "noise"},
        also=(r"first wrong after .*GPU 0 -> GPU 3;",),
    ),
    copy(
        "chain corrupts, pairs are fine",
        r"GPU 0 -> GPU 1 -> GPU 2 -> GPU 3 -> GPU 0: .*\(all zero\).*first wrong after "
        r"GPU 1 -> GPU 2;",
        fault={"kind": "chain", "pair": [1, 2], "how": "zero"},
        also=(r"first wrong after .*GPU 1 -> GPU 2;",),
        fast=True,
    ),
    copy(
        "host copy changes a byte",
        r"bytes from the host arrived changed on GPU 2",
        fault={"kind": "upload", "gpu": 2},
        also=(r"GPU 2.*",),
    ),
    copy(
        "GPU computes wrong bits",
        r"GPU 3 has other bits than GPU 0, GPU 1, GPU 2|GPU 3 is .* off the CPU's",
        fault={"kind": "product", "gpu": 3},
    ),
    copy(
        "slow sibling",
        r"GPU 2 reaches .*, its siblings .*: below 80% of them; it ran at 1980 of 1980 MHz, 40 C, "
        r"70 W, not slowed; its siblings at 1980 of 1980 MHz, 40 C, 70 W, not slowed",
        fault={"kind": "slow", "gpu": 2, "times": 2},
        also=(r"GPU 2 .*(siblings|same link|datasheet)",),
    ),
    copy(
        "worker killed",
        r"the CUDA worker died \(SIGKILL\) at step 'copies' on GPU 0 -> GPU 1",
        fault={"kind": "kill", "at": "copy_into", "gpus": [0, 1]},
        fast=True,
    ),
    copy(
        "worker hangs at a copy",
        r"the CUDA worker hung at step 'copies' on GPU 2 -> GPU 3; killed after 8 s",
        seconds=8.0,
        fault={"kind": "hang", "at": "copy_into", "gpus": [2, 3]},
        limit=40.0,
    ),
    copy(
        "worker hangs making a context",
        r"the CUDA worker hung at step 'contexts' on GPU 1; killed after 8 s",
        seconds=8.0,
        fault={"kind": "hang", "at": "open", "gpus": [1]},
        limit=40.0,
    ),
    copy(
        "GPU raises while computing",
        r"the CUDA worker failed at step 'arithmetic' on GPU 1: RuntimeError: CUDA error: an",
        fault={"kind": "raise", "at": "matmul", "gpus": [1]},
    ),
    copy(
        "no room for the copies, strict",
        r"not measured: GPU 1 has 1 MiB free; copies and arithmetic need",
        fault={"kind": "full", "gpu": 1},
        args="-m quick --gpu-strict",
        also=(r"not measured", r"^test_"),
    ),
]

CHECKPOINTS = [
    shard(
        "shard missing",
        r"model-00002-of-00003\.safetensors is missing; copy or download it again(?!; copy)",
        lambda where: (where / files.SHARD).unlink(),
        fast=True,
    ),
    shard("shard truncated", r"model-00002-of-00003\.safetensors is truncated", files.cut),
    shard("shard padded", r"model-00002-of-00003\.safetensors is padded", files.pad),
    shard(
        "shard is a named pipe",
        r"model-00002-of-00003\.safetensors cannot be read \(it is a named pipe, not a regular",
        files.pipe,
    ),
    shard(
        "shard is an LFS pointer",
        r"00002-of-00003\.safetensors is a Git LFS pointer",
        files.pointer,
    ),
    shard(
        "index names a missing file",
        r"model-00004-of-00004\.safetensors is missing",
        files.rename_in_index,
    ),
    shard(
        "index names a missing tensor",
        r"lacks tensor model\.layers\.9\.mlp\.up_proj\.weight",
        files.lacking_tensor,
    ),
    shard(
        "index is not JSON",
        r"index\.json is not valid JSON",
        lambda where: (where / files.INDEX).write_text("{"),
    ),
    shard(
        "truncated shard, loaded",
        r"model-00002-of-00003\.safetensors is truncated",
        files.cut,
        args=f"{MODEL} --gpu-model={{checkpoint}}",
        also=(r"model-00002-of-00003\.safetensors",),
    ),
    shard(
        "of another model",
        r"lm_head\.weight has the shape \[512, 64\], the model's config\.json says \[512, 128\]",
        files.other_config,
        args=f"{MODEL} --gpu-model={{checkpoint}} -k distribution",
    ),
    shard(
        "lacks a layer",
        r"tensors are not in the checkpoint, first model\.layers\.6\.input_layernorm",
        files.more_layers,
        args=f"{MODEL} --gpu-model={{checkpoint}} -k distribution",
    ),
    Fault(
        name="disk full",
        issue=3,
        reason=r"the checkpoint needs .* at .*/small/checkpoint; found 0 B free",
        line=r"00002-of-00003\.safetensors is missing",
        around=files.small_disk,
        prepare=files.fill_disk,
        args=f"{MODEL} -m quick --gpu-model={{checkpoint}}",
        also=(r"is missing",),
    ),
    Fault(
        name="container with too little memory",
        issue=3,
        reason=r"needs 4\.0 GiB of host memory; its cgroup leaves 0\.5 GiB",
        plants=(nvml(), ("host", {"limit_bytes": GIB, "used_bytes": GIB // 2})),
        exit=10,
    ),
]

PLANS = [
    Fault(
        name="device map puts layers on the CPU",
        issue=2,
        reason=r"1 block would go to the CPU: model\.layers\.40",
        plants=(nvml(),),
        prepare=files.device_map({"model.layers.40": "cpu"}),
        args="-m quick --gpu-tier=16bit --gpu-placement={folder}/map.json",
        also=(r"the plan puts model\.layers\.40 on cpu", r"were asked for and 0 fit"),
        fast=True,
    ),
    Fault(
        name="device map overloads one GPU",
        issue=2,
        reason=r"GPU 0 lacks .* GiB",
        plants=(nvml(),),
        prepare=files.text(map__json='{"": 0}'),
        args="-m quick --gpu-tier=16bit --gpu-placement={folder}/map.json",
        also=(r"GPU 0.*", r"were asked for and 0 fit"),
    ),
    Fault(
        name="device map names a GPU that is not there",
        issue=2,
        reason=r"map\.json: model\.layers\.40 is on GPU 4, but CUDA sees GPUs 0 to 3",
        plants=(nvml(),),
        prepare=files.device_map({"model.layers.40": 4}),
        args="-m quick --gpu-placement={folder}/map.json",
        exit=4,
    ),
    Fault(
        name="context beyond the model's positions",
        issue=2,
        reason=r"llama-3\.3-70b has 131072 positions \(max_position_embeddings\); "
        r"9000000 tokens were asked for; --gpu-context=131072 is the longest that fits as placed",
        plants=(nvml(),),
        args="-m quick --gpu-context=9000000",
        also=(
            r"GPU \d lacks \d+\.\d GiB of \d+\.\d GiB",
            r"9000000 tokens x 1 were asked for and 131072 fit; --gpu-context=131072$",
        ),
    ),
    Fault(
        name="context too long for the GPUs",
        issue=2,
        reason=r"GPU 1 lacks \d\.\d GiB: it would peak at 8\d\.\d GiB of 79\.2 GiB free "
        r"with 131072 tokens x 1; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True fits",
        plants=(nvml(gpus=2),),
        args="-m quick --gpu-context=131072",
        also=(
            r"GPU 1 lacks \d\.\d GiB of 8\d\.\d GiB",
            r"131072 tokens x 1 were asked for and 12\d{4} fit; --gpu-context=12\d{4}$",
        ),
    ),
    Fault(
        name="contexts too long for the GPUs",
        issue=2,
        reason=r"GPU 1 lacks \d+\.\d GiB: it would peak at \d+\.\d GiB of 79\.2 GiB free "
        r"with 131072 tokens x 2; --gpu-context=\d{5} is the longest that fits as placed",
        plants=(nvml(gpus=2),),
        args="-m quick --gpu-context=131072 --gpu-batch=2",
        exit=10,
        also=(
            r"GPU \d lacks \d+\.\d GiB of \d+\.\d GiB",
            r"131072 tokens x 2 were asked for and \d{5} fit; --gpu-context=\d{5}$",
        ),
    ),
    Fault(
        name="auto refuses 8 bit on one card",
        issue=2,
        reason=r"device_map='auto' refuses: .*--gpu-placement=balanced fits",
        plants=(nvml(gpus=1),),
        args="-m quick --gpu-tier=8bit",
        also=(r"the plan puts model\.layers\.\d+", r"were asked for and 0 fit"),
    ),
]

MODELS = [
    model(
        "activations zeroed at a layer",
        r"hidden_states\[5\] on CPU is zero at",
        ("layer", {"layer": 4, "how": "zero"}),
        issue=5,
        also=(
            r"differ from an uncached forward",
            r"hidden_states\[\d\] can't be told",
            r"^CPU: .*planted",
            r"scores change",
        ),
    ),
    model(
        "NaN in a layer's output",
        r"NaN or infinity at \d+ positions, first 0",
        ("layer", {"layer": 1, "how": "nan"}),
        also=(
            r"differ from an uncached forward",
            r"can't be told from",
            r"not finite",
            r"ScoringError: .*(nan|finite)",
        ),
    ),
    model(
        "noise at every pass",
        r"two greedy generations of the same prompt differ",
        ("layer", {"layer": 2, "how": "noise"}),
        args="-k generation",
        also=(r"differ from an uncached forward",),
    ),
    model(
        "cached decoding is wrong",
        r"tokens differ from an uncached forward",
        ("layer", {"layer": 2, "how": "decoding"}),
        args="-k generation",
        also=(r"two greedy",),
    ),
    model(
        "NaN in one weight",
        r"NaN or infinity at \d+ positions, first 0",
        ("weight_nan", {}),
        args="-k test_greedy_generation",
        also=(r"differ from an uncached forward",),
    ),
    model(
        "weights never arrived",
        r"not on the CPU: model\.layers\.2 on meta",
        ("meta_layer", {"layer": 2}),
        args="-k distribution",
        also=(r"model\.layers\.2 on meta, planned cpu",),
    ),
    model(
        "half of the head is lost",
        r"tiny-llama has [\d,]+ parameters, [\d,]+ were found",
        ("short_weight", {}),
        args="-k distribution",
    ),
    model(
        "part of the model offloaded to disk",
        r"ValueError while loading: The current `device_map` had weights offloaded to the disk",
        ("map", {"device_map": {"": "cpu", "model.layers.3": "disk"}}),
        args="-k distribution",
        also=(),
    ),
    model(
        "out of memory while loading",
        r"GPU 1: out of memory while loading: 448\.00 MiB wanted, 12\.00 MiB free",
        ("load", {"how": "raise"}),
        args="-k test_distribution",
        fast=True,
    ),
    model(
        "loading hangs",
        r"Timeout \(>8\.0s\)",
        ("load", {"how": "hang"}),
        args="-k distribution --timeout=8",
        issue=6,
        limit=60.0,
    ),
    model(
        "generation hangs",
        r"Timeout \(>12\.0s\)",
        ("generation", {"how": "hang"}),
        args="-k test_greedy_generation --timeout=12",
        issue=6,
        limit=60.0,
    ),
    model(
        "killed while loading",
        r"test_parameters_lie_where_planned",
        ("load", {"how": "kill"}),
        args="-k distribution",
        issue=6,
        killed=True,
        exit=-9,
        fast=True,
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
        "killed while writing the report",
        r"test_",
        ("report_kill", {}),
        args="-m quick",
        issue=6,
        killed=True,
        exit=-9,
    ),
    model(
        "meter reads nonsense",
        r"the process held less than the weights: the meter is wrong",
        ("meter", {"used": 4096}),
        args="-k peak",
    ),
    model(
        "meter cannot read, strict",
        r"no reading of resident memory",
        ("meter", {"used": None}),
        args="-k peak --gpu-strict",
        issue=6,
        also=(r"^test_",),
    ),
]

PROBES = [
    probe(
        "off-by-one layer",
        r"the scorer's activations at site raw are not hidden_states\[2\]",
        ("scorer", {"mistake": "off by one"}),
        also=(r"planted tokens' scores do not move", r"re-forwarded after cached generation"),
    ),
    probe(
        "raw instead of final_norm",
        r"activations at site final_norm are not hidden_states\[2\]",
        ("scorer", {"mistake": "raw site"}),
        prepare=files.probe(site="final_norm"),
        args="--gpu-probe={probe}",
        also=(),
    ),
    probe(
        "batch row 0 only",
        r"scores change when the same text is scored in a batch padded on the right",
        ("scorer", {"mistake": "batch row 0"}),
        also=(r"in a batch padded",),
    ),
    probe(
        "padding not masked",
        r"scored in a batch padded on the left",
        ("scorer", {"mistake": "unpadded mask"}),
        also=(r"in a batch padded",),
    ),
    probe(
        "span not widened",
        r"5 tokens are not scored that must be",
        ("scorer", {"mistake": "narrow span"}),
        also=(),
    ),
    probe(
        "hook on a moved module",
        r"the hook on hidden_states\[2\] never ran",
        ("scorer", {"mistake": "moved module"}),
        also=(r"never ran",),
    ),
    probe(
        "scaler on the wrong device",
        r"the probe's mean for hidden_states\[2\] is on meta, its activations on cpu",
        ("scorer", {"mistake": "scaler elsewhere"}),
        prepare=files.probe(scaler=5.4, normalize=True),
        args="--gpu-probe={probe}",
        also=(r"is on meta",),
    ),
    probe(
        "exception in the scorer",
        r"scoring failed: RuntimeError: mat1 and mat2",
        ("scorer", {"mistake": "broken"}),
        also=(r"scoring failed",),
        fast=True,
    ),
    probe(
        "sign turned",
        r"the score differs from a float64 computation",
        ("scorer", {"mistake": "inverted"}),
        also=(r"planted tokens' scores do not move",),
    ),
    probe(
        "every score is 0.5",
        r"the score differs from a float64 computation of it",
        ("scorer", {"mistake": "0.5"}),
        also=(r"planted tokens' scores do not move", r"all (tokens|texts) have the same score"),
    ),
    probe(
        "probe of another hidden size",
        r"the probe was fitted on a model of another hidden size",
        prepare=files.probe(hidden=128),
        args="--gpu-probe={probe}",
        also=(r"hidden size 128",),
    ),
    probe(
        "probe of another model",
        r"the probe was fitted on another model",
        prepare=files.probe(model="acme/Other-9B"),
        args="--gpu-probe={probe}",
    ),
    probe(
        "layer out of range",
        r"layer 22 is out of range for 6 layers",
        prepare=files.probe(layers=(22,), num_layers=80),
        args="--gpu-probe={probe}",
        also=(r"layer 22",),
    ),
    probe(
        "probe of another site",
        r"activations at layer 2, site raw, are .* times the size that the probe was fitted on",
        prepare=files.with_checkpoint(files.probe(scaler=1000.0)),
        args="--gpu-probe={probe} --gpu-model={checkpoint}",
        also=(),
    ),
    probe(
        "probe without a scaler, strict",
        r"the probe has no scaler, so nothing tells whether its layer and site are right",
        prepare=files.with_checkpoint(files.probe()),
        args="--gpu-probe={probe} --gpu-model={checkpoint} --gpu-strict",
        also=(r"^test_activation_size",),
    ),
    probe(
        "probe of a model without its weights, strict",
        r"needs the checkpoint; weights were synthesised",
        prepare=files.probe(scaler=1.8, site="final_norm"),
        args="--gpu-probe={probe} --gpu-strict",
        also=(r"^test_activation_size",),
    ),
    probe(
        "NaN in one direction",
        r"directions: of layer 3 has nan",
        prepare=files.nan_probe,
        args="--gpu-probe={probe}",
        also=(r"has nan",),
    ),
    probe(
        "probe file cut short",
        r"probe\.safetensors: is damaged",
        prepare=files.cut_probe,
        args="--gpu-probe={probe}",
        also=(r"probe\.safetensors: ",),
    ),
    probe(
        "scores moved since an earlier run",
        r"scores in cpu are not those of an earlier run; .* delete drift\.json",
        prepare=files.earlier_scores(lambda values: [value + 1 for value in values]),
        also=(),
        fast=True,
    ),
    probe(
        "scores reordered since an earlier run",
        r"scores in cpu are not those of an earlier run",
        prepare=files.earlier_scores(lambda values: values[::-1]),
        also=(),
    ),
    probe(
        "NaN in one text's score",
        r"1 of 60 scores are no number",
        ("scorer", {"mistake": "nan text"}),
        also=(),
    ),
    probe(
        "scores of an earlier run damaged",
        r"report/drift\.json: is not JSON .*; repair it, move it away",
        prepare=files.damaged_drift,
        exit=4,
        also=(),
    ),
    probe(
        "pickle that runs a command",
        r"detector\.pt: refused: it names the global 'posix\.system'",
        prepare=files.evil_probe,
        never="ran",
        args="--gpu-probe={probe}",
        also=(r"detector\.pt: ",),
    ),
]

CHECK = """
import pytest
from pytest_multigpu.records.check import Record
pytestmark = [pytest.mark.check(needs="host"), pytest.mark.quick]
def test_it():
    return {returned}
"""


def own(name: str, reason: str, source: str, **more: Any) -> Fault:
    args = f"{{folder}}/test_own.py {more.pop('args', '--gpu-tier=cpu')}"
    prepare = files.text(test_own__py=source)
    return Fault(
        name=name, issue=6, reason=reason, prepare=prepare, args=args, checks=False, **more
    )


def returning(name: str, reason: str, returned: str, **more: Any) -> Fault:
    return own(name, reason, CHECK.replace("{returned}", returned), **more)


GATES = [
    returning("a check returns nothing", r"returned None instead of records", "None", fast=True),
    returning("a check returns True", r"returned True instead of records", "True"),
    returning("a check raises", r"ZeroDivisionError: division by zero", "1 / 0"),
    returning(
        "unknown under strict",
        r"it could not be read",
        'Record(name="a", outcome="unknown", reason="it could not be read")',
        args="--gpu-tier=cpu --gpu-strict",
        also=(r"^test_it",),
    ),
    own(
        "hardware skip under strict",
        r"needs 2 GPUs with 40\.0 GiB free each; found no GPU",
        'import pytest\n@pytest.mark.gpu(count=2, vram="40GiB")\ndef test_x(): pass\n',
        plants=(nvml(gpus=0),),
        args="--gpu-strict",
        exit=10,
        also=(r"needs 2 GPUs",),
    ),
    own(
        "no check under strict",
        r"no check was executed",
        "def test_x(): pass\n",
        args="--gpu-tier=cpu --gpu-strict",
    ),
    own(
        "detection broken is no skip",
        r"the GPUs could not be asked: NVML cannot start: Unknown Error",
        "import pytest\n@pytest.mark.gpu\ndef test_x(): pass\n",
        plants=(nvml(errors={"nvmlInit": 999}),),
        args="",
    ),
    own(
        "nothing collected under strict",
        r"no test was collected",
        "x = 1\n",
        args="--gpu-tier=cpu --gpu-strict",
        exit=5,
    ),
    own(
        "file that cannot be imported",
        r"could not be collected: ModuleNotFoundError: No module named 'no_such_module_anywhere'",
        "import no_such_module_anywhere\n",
        exit=2,
        also=(r"could not be collected",),
    ),
    own(
        "marker with a size without unit",
        r"test_own\.py::test_x: gpu\(vram=\): '40' has no unit; write 40GiB",
        'import pytest\n@pytest.mark.gpu(vram="40")\ndef test_x(): pass\n',
        exit=4,
    ),
    Fault(
        name="unknown tier",
        issue=2,
        reason=r"--gpu-tier: unknown tier '6bit'",
        args="--gpu-tier=6bit",
        exit=4,
    ),
    Fault(
        name="game config with a wrong value",
        issue=2,
        reason=r"game\.json: quantization_bits: 5 is not known",
        prepare=files.text(game__json='{"quantization_bits": 5}'),
        args="--gpu-config={folder}/game.json",
        exit=4,
    ),
    Fault(
        name="baseline damaged",
        issue=6,
        reason=r"base\.json: is not JSON",
        prepare=files.text(base__json="{"),
        args=f"{MODEL} -m quick --gpu-baseline={{folder}}/base.json",
        exit=4,
    ),
    Fault(
        name="baseline missing under strict",
        issue=6,
        reason=r"base\.json has no baseline for .*record it with --gpu-baseline-update",
        args=f"{MODEL} --gpu-strict -k plan --gpu-baseline={{folder}}/base.json",
        also=(r"baseline", r"skip|cpu tier"),
    ),
]

FAULTS = [
    *MACHINE,
    *COPIES,
    *SELECTIONS,
    *CHECKPOINTS,
    *PLANS,
    *MODELS,
    *PROBES,
    *GATES,
]


def _healthy(name: str, args: str, *plants: Plant, **more: Any) -> Fault:
    return Fault(
        name=f"healthy: {name}", issue=6, reason="", exit=0, args=args, plants=plants, **more
    )


HEALTHY = [
    _healthy("cpu tier", MODEL),
    _healthy("quick, four H100s", "-m quick", nvml(), fast=True),
    _healthy("quick, 8 bit, four H100s", "-m quick --gpu-tier=8bit", nvml()),
    _healthy(
        "cpu tier, quick, strict",
        f"{MODEL} -m quick",
    ),
    _healthy(
        "quick, mixed cards, the fastest first",
        "-m quick",
        nvml(change={"0": RTX_3090}, by_speed=[1, 2, 3, 0]),
    ),
    _healthy(
        "quick, a desktop's memory on a small card",
        "-m quick --gpu-model=llama-3.2-1b",
        nvml(gpus=1, change={"0": RTX_3090 | {"total": 8 * GIB, "used": 2 * GIB + GIB // 5}}),
    ),
    _healthy(
        "quick, half the lanes",
        "-m quick",
        nvml(change={"1": {"pcie": [5, 5, 8, 16]}}),
        ("worker", {"fault": {"kind": "narrow", "gpu": 1, "times": 2}}),
    ),
    _healthy(
        "quick, gaming cards, no skip tolerated",
        "-m quick --gpu-tier=4bit --gpu-placement=balanced --gpu-expected-skips={folder}/none.txt",
        nvml(gpus=2, change={"0": GAMING, "1": GAMING}),
        prepare=files.text(none__txt=""),
    ),
    _healthy("quick, reordered", "-m quick", nvml(), env={"CUDA_VISIBLE_DEVICES": "3,1,0,2"}),
    _healthy(
        "quick, a comma at the end", "-m quick", nvml(), env={"CUDA_VISIBLE_DEVICES": "0,1,2,3,"}
    ),
    _healthy(
        "quick, by UUID prefix",
        "-m quick --gpu-tier=4bit",
        nvml(),
        env={"CUDA_VISIBLE_DEVICES": "GPU-00000001,GPU-00000003"},
    ),
    _healthy(
        "cpu tier, a checkpoint",
        f"{MODEL} --gpu-model={{checkpoint}}",
        prepare=files.damaged(lambda where: None),
    ),
    _healthy(
        "cpu tier, a folder with a config alone",
        f"{MODEL} -m quick --gpu-model={{checkpoint}}",
        prepare=files.damaged(files.no_weights),
        fast=True,
    ),
    _healthy(
        "cpu tier, a config file",
        f"{MODEL} -m quick --gpu-model={{checkpoint}}/config.json",
        prepare=files.damaged(lambda where: None),
    ),
    _healthy(
        "cpu tier, a checkpoint of pickles",
        f"{MODEL} --gpu-model={{checkpoint}}",
        prepare=files.damaged(files.pickles),
    ),
    _healthy(
        "cpu tier, a hub cache with a config alone",
        f"{MODEL} -m quick --gpu-model=llama-3.2-1b",
        prepare=files.hub_cache_without_weights,
        env={"HF_HUB_CACHE": "{folder}/hub"},
    ),
    _healthy("cpu tier, a probe file", f"{MODEL} --gpu-probe={{probe}}", prepare=files.probe()),
]
