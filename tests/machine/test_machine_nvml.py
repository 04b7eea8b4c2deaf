"""The inventory, on the fake machine and, where there is one, on the real."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.judging.machine import judge_gpus
from pytest_multigpu.judging.vram import judge_free_memory
from pytest_multigpu.machine import health
from pytest_multigpu.machine import nvml as module
from pytest_multigpu.machine.fake import GPU_IS_LOST, H100_BYTES, NOT_SUPPORTED, FakeGpu, FakeNvml
from pytest_multigpu.machine.health import Sampler, merge, read_health
from pytest_multigpu.machine.holders import read_free, wait_for_free
from pytest_multigpu.machine.nvml import read_machine
from pytest_multigpu.records.health import FreeMemory, GpuHealth
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.requirements import GpuRequirement, unmet
from pytest_multigpu.units import GIB, MIB, gib


def _bindings() -> list[Any]:
    return ["fake", "real"]


@pytest.fixture(params=_bindings())
def binding(request: pytest.FixtureRequest) -> Any:
    if request.param == "fake":
        return FakeNvml(4)
    if not read_machine({}).gpus:
        pytest.skip("needs a GPU that NVML lists; found none")
    return module.load_nvml()


def test_contract_inventory(binding: Any) -> None:
    machine = read_machine({}, binding)
    assert machine.problem is None
    assert machine.driver
    assert machine.cuda
    assert [gpu.index for gpu in machine.gpus] == list(range(len(machine.gpus)))
    assert machine.visible == tuple(range(len(machine.gpus)))
    for gpu in machine.gpus:
        assert gpu.problem is None
        assert gpu.uuid.startswith("GPU-")
        assert gpu.capability is not None
        assert gpu.free_bytes + gpu.used_bytes + gpu.reserved_bytes == gpu.total_bytes
        assert isinstance(gpu.name, str)


def test_contract_health(binding: Any) -> None:
    rows = read_health(binding)
    assert len(rows) == len(read_machine({}, binding).gpus)
    for row in rows:
        assert row.problem is None
        assert row.samples == 1
        assert row.throttle is None or row.throttle >= 0
        assert row.nvlinks_active is not None
        assert row.ecc in ("on", "off", "none")


def test_contract_errors_carry_their_code(binding: Any) -> None:
    module.open_nvml(binding)
    with pytest.raises(binding.NVMLError) as caught:
        binding.nvmlDeviceGetHandleByIndex(9999)
    assert caught.value.value == 2


def test_contract_free_memory(binding: Any) -> None:
    for row in read_free(binding):
        assert row.problem is None
        assert row.total_bytes > row.free_bytes >= 0


def test_sizes_and_versions() -> None:
    machine = read_machine({}, FakeNvml([FakeGpu(used=3 * GIB)]))
    (gpu,) = machine.gpus
    assert (gpu.total_bytes, gpu.used_bytes, gpu.reserved_bytes) == (
        H100_BYTES,
        3 * GIB,
        480 * MIB,
    )
    assert gpu.free_bytes == H100_BYTES - 3 * GIB - 480 * MIB
    assert (machine.driver, machine.cuda) == ("580.95.05", "13.0")
    assert read_machine({}, FakeNvml(1, cuda=12080)).cuda == "12.8"


def test_an_old_driver_has_no_v2_memory() -> None:
    gpu = FakeGpu(errors={"nvmlDeviceGetMemoryInfo_v2": 13})
    (row,) = read_machine({}, FakeNvml([gpu])).gpus
    assert (row.used_bytes, row.reserved_bytes) == (480 * MIB, 0)
    assert row.problem is None


@pytest.mark.parametrize("code", [NOT_SUPPORTED, GPU_IS_LOST, 16, 999])
def test_an_unreadable_gpu_stays_a_row(code: int) -> None:
    fake = FakeNvml(3)
    fake.gpus[1].errors["nvmlDeviceGetName"] = code
    machine = read_machine({}, fake)
    assert [gpu.index for gpu in machine.gpus] == [0, 1, 2]
    assert machine.problem is None
    assert machine.gpus[1].problem == f"GPU 1 cannot be read: {fake.NVMLError(code)}"
    assert machine.visible == (0, 1, 2)


def test_a_gpu_that_shares_the_hosts_memory_says_so() -> None:
    both = ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2")
    fake = FakeNvml([FakeGpu(name="NVIDIA GB10", errors=dict.fromkeys(both, NOT_SUPPORTED))])
    machine = read_machine({}, fake)
    (gpu,) = machine.gpus
    assert gpu.problem == (
        "GPU 0 (NVIDIA GB10): the driver does not report its memory, as with GPUs that share the "
        "host's"
    )
    rows = [FreeMemory(gpu=0, total_bytes=0, free_bytes=0, used_bytes=0, problem=gpu.problem)]
    for record in (*judge_gpus(machine), *judge_free_memory(machine, rows, {}, plan_fits=False)):
        assert (record.outcome, record.reason) == ("failed", gpu.problem)
        assert record.remedy == (
            "rent a machine whose GPUs have memory of their own: nothing can be planned without "
            "its size"
        )


def test_a_gpu_lost_midway_keeps_what_was_read() -> None:
    fake = FakeNvml(2)

    def lose(function: str) -> None:
        if function == "nvmlDeviceGetMemoryInfo_v2" and fake.calls.count(function) == 2:
            fake.lose(1)

    fake.before_call = lose
    first, second = read_machine({}, fake).gpus
    assert first.problem is None
    assert second.problem == "GPU 1 cannot be read: GPU is lost"
    assert second.uuid == fake.gpus[1].uuid


@pytest.mark.parametrize(
    ("code", "files", "expected"),
    [
        (12, 0, Machine()),
        (
            12,
            2,
            Machine(
                problem="libnvidia-ml.so.1 is missing although /dev has 2 NVIDIA GPUs: "
                "start the container with the NVIDIA runtime (docker run --gpus all)"
            ),
        ),
        (
            18,
            0,
            Machine(
                problem="the NVIDIA driver and its library have different versions: "
                "reboot the machine, or rent another"
            ),
        ),
        (9, 0, Machine(problem="NVML cannot start: Driver Not Loaded")),
        (999, 4, Machine(problem="NVML cannot start: Unknown Error")),
    ],
)
def test_no_gpu_and_broken_detection_differ(
    code: int, files: int, expected: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "count_device_files", lambda: files)
    assert read_machine({}, FakeNvml(4, errors={"nvmlInit": code})) == expected


@pytest.mark.parametrize(("files", "broken"), [(0, False), (1, True)])
def test_nvml_without_gpus(files: int, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "count_device_files", lambda: files)
    machine = read_machine({}, FakeNvml(0))
    assert machine.gpus == ()
    assert (machine.problem is not None) is broken


@pytest.mark.parametrize("grows", [True, False])
def test_the_allocator_that_the_environment_asks_for(grows: bool) -> None:
    environ = {"PYTORCH_ALLOC_CONF": f"expandable_segments:{grows}"}
    assert read_machine(environ, FakeNvml(1)).expandable_segments is grows


def test_a_hanging_driver_is_given_up_on() -> None:
    fake = FakeNvml(2)
    fake.hang = "nvmlDeviceGetUUID"
    start = time.monotonic()
    machine = read_machine({"CUDA_VISIBLE_DEVICES": "0"}, fake, seconds=0.1)
    fake.let_go.set()
    assert time.monotonic() - start < 2
    assert machine.problem == "NVML did not answer within 0.1 s while reading GPU 0"
    assert machine.visible_env == "0"


def test_an_answer_that_cannot_be_read_is_not_no_gpu() -> None:
    fake = FakeNvml([FakeGpu(total=None)])  # type: ignore[arg-type]
    machine = read_machine({}, fake)
    assert machine.problem is not None
    assert machine.problem.startswith("NVML gave an answer that cannot be read: TypeError(")


def test_load_nvml_is_the_one_door(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(2)
    monkeypatch.setattr(module, "load_nvml", lambda: fake)
    assert len(read_machine({}).gpus) == 2
    assert len(read_health()) == 2
    assert len(read_free()) == 2


def test_health_tells_unsupported_from_none() -> None:
    card = FakeGpu(nvlinks=(), errors={"nvmlDeviceGetTotalEccErrors": NOT_SUPPORTED})
    card.errors["nvmlDeviceGetMigMode"] = NOT_SUPPORTED
    (row,) = read_health(FakeNvml([card]))
    assert (row.ecc_volatile, row.nvlinks_active, row.nvlinks_inactive) == (None, 0, 0)
    assert row.mig is False
    card.errors["nvmlDeviceGetNvLinkState"] = 999
    (row,) = read_health(FakeNvml([card]))
    assert (row.nvlinks_active, row.nvlinks_inactive) == (None, None)


@pytest.mark.parametrize(
    ("card", "mode", "errors"),
    [
        (FakeGpu(), "on", 0),
        (FakeGpu(ecc_on=False), "off", None),
        (
            FakeGpu(
                errors={
                    "nvmlDeviceGetEccMode": NOT_SUPPORTED,
                    "nvmlDeviceGetTotalEccErrors": NOT_SUPPORTED,
                }
            ),
            "none",
            None,
        ),
        (FakeGpu(errors={"nvmlDeviceGetEccMode": 999}), None, 0),
    ],
)
def test_ecc_that_is_off_or_not_there(card: FakeGpu, mode: str | None, errors: int | None) -> None:
    (row,) = read_health(FakeNvml([card]))
    assert (row.ecc, row.ecc_volatile, row.ecc_aggregate) == (mode, errors, errors)
    assert (row.problem, row.samples) == (None, 1)


def test_health_counts_links_up_and_down() -> None:
    (row,) = read_health(FakeNvml([FakeGpu(nvlinks=(True, False, True))]))
    assert (row.nvlinks_active, row.nvlinks_inactive) == (2, 1)


@pytest.mark.parametrize(
    ("links", "errors", "found"),
    [
        ((True,) * 18, {}, 18),
        ((True, False, True), {}, 2),
        ((), {}, 0),
        ((True,), {"nvmlDeviceGetNvLinkState": 999}, None),
    ],
)
def test_the_inventory_counts_links_that_are_up(
    links: tuple[bool, ...], errors: dict[str, int], found: int | None
) -> None:
    fake = FakeNvml([FakeGpu(nvlinks=links, errors=errors)])
    machine = read_machine({}, fake)
    assert (machine.gpus[0].nvlinks, machine.gpus[0].problem) == (found, None)
    lacking = unmet(GpuRequirement(nvlink=True), machine)
    facts = {None: "NVLinks unknown", 0: "0 NVLinks up"}.get(found)
    free = gib(machine.gpus[0].free_bytes)
    expected = f"needs 1 GPU with NVLink; found 0 (GPU 0: {free} free, {facts})"
    assert lacking == (None if found else expected)


def test_a_gpu_lost_while_its_links_are_counted_is_a_problem() -> None:
    fake = FakeNvml([FakeGpu(errors={"nvmlDeviceGetNvLinkState": GPU_IS_LOST})])
    assert read_machine({}, fake).gpus[0].problem == "GPU 0 cannot be read: GPU is lost"


def test_health_of_a_lost_gpu_is_a_problem() -> None:
    fake = FakeNvml(2)
    fake.lose(1)
    good, lost = read_health(fake)
    assert good.problem is None
    assert lost.problem == "GPU 1 cannot be read: GPU is lost"


def test_merging_keeps_the_worst() -> None:
    merged = merge(
        [
            GpuHealth(index=0, name="A", throttle=0x1, temperature_c=50, ecc_volatile=0),
            GpuHealth(index=0, throttle=0x20, temperature_c=44, pcie_width=16, busy_samples=1),
        ]
    )
    assert merged == GpuHealth(
        index=0,
        name="A",
        throttle=0x21,
        temperature_c=50,
        ecc_volatile=0,
        pcie_width=16,
        samples=2,
        busy_samples=1,
    )


def test_the_sampler_sees_what_comes_and_goes() -> None:
    fake = FakeNvml(1)
    with Sampler([0], fake, interval=0.001) as sampler:
        fake.gpus[0].reasons = 0x40
        deadline = time.monotonic() + 5
        while not (sampler.result()[0].throttle or 0) & 0x40 and time.monotonic() < deadline:
            time.sleep(0.001)
        fake.gpus[0].reasons = 0
    (row,) = sampler.result()
    assert row.throttle is not None
    assert row.throttle & 0x40
    assert row.ecc_volatile == 0
    assert row.samples > 1


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_every_sample_counts_however_many_are_merged_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(health, "_MERGED_AT_ONCE", at_once)
    fake = FakeNvml(2)
    with Sampler([0, 1], fake, interval=0.0) as sampler:
        for reasons in (0x20, 0x40, 0):
            fake.gpus[1].reasons = reasons
            time.sleep(0.02)
    whole = sampler.result()
    assert [row.throttle for row in whole] == [0, 0x60]
    assert whole == sampler.result()
    then = sampler.between(0, time.time())
    assert [row.samples for row in then] == [row.samples for row in whole]
    assert whole[0].samples > 3


def test_the_sampler_tells_some_seconds_from_the_rest() -> None:
    fake = FakeNvml(2)

    def until(reasons: int) -> float:
        fake.gpus[1].reasons = reasons
        seen = sampler.result()[1].samples
        deadline = time.monotonic() + 5
        while sampler.result()[1].samples < seen + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        return time.time()

    with Sampler([0, 1], fake, interval=0.001) as sampler:
        began = until(0)
        slowed = until(0x40)
        ended = until(0)
    first, second = sampler.between(began, slowed)
    assert (first.index, first.throttle, second.index) == (0, 0, 1)
    assert second.throttle == 0x40
    # What does not change under load is there too.
    assert (second.name, second.sm_max_mhz, second.ecc_volatile) == (fake.gpus[1].name, 1980, 0)
    assert 0 < second.samples < sampler.result()[1].samples
    assert sampler.between(ended + 60, ended + 61) == ()
    assert sampler.between(0, began)[1].throttle == 0


def test_a_sampler_that_cannot_start_is_no_health() -> None:
    with Sampler([0, 1], FakeNvml(2, errors={"nvmlInit": 999})) as sampler:
        pass
    assert [row.problem for row in sampler.result()] == [
        "health could not be sampled: Unknown Error"
    ] * 2


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_waiting_ends_as_soon_as_memory_is_free() -> None:
    fake, clock = FakeNvml([FakeGpu(used=70 * GIB)]), _Clock()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now >= 1:
            fake.gpus[0].used = 0

    rows, waited = wait_for_free({0: 40 * GIB}, 10, nvml=fake, clock=lambda: clock.now, sleep=sleep)
    assert waited == 1
    assert rows[0].used_bytes == 0


@pytest.mark.parametrize(("spare", "waits"), [(0, False), (-1, True), (1, False)])
def test_waiting_at_the_byte(spare: int, waits: bool) -> None:
    need = H100_BYTES - 480 * MIB - 5 * GIB
    fake, clock = FakeNvml([FakeGpu(used=5 * GIB - spare)]), _Clock()
    _, waited = wait_for_free({0: need}, 2, nvml=fake, clock=lambda: clock.now, sleep=clock.sleep)
    assert (waited == 2) is waits
    assert bool(clock.slept) is waits


def test_holders_are_named_largest_first() -> None:
    fake = FakeNvml([FakeGpu(used=41 * GIB, processes={os.getpid(): GIB, 4_000_000: 40 * GIB})])
    (row,) = read_free(fake)
    assert [holder.pid for holder in row.holders] == [4_000_000, os.getpid()]
    assert row.holders[0].name is None
    assert row.holders[1].name
    assert row.holders[1].user


@pytest.mark.parametrize(
    ("comm", "name"),
    [
        ("trainiert-für".encode()[:12], "trainiert-f\ufffd"),  # as the kernel cuts a long name
        (b"two\nlines", "two\\nlines"),
        (b"  ", None),
    ],
)
def test_any_process_name_is_one_readable_line(comm: bytes, name: str | None) -> None:
    own = Path("/proc/self/comm")
    before = own.read_bytes()
    own.write_bytes(comm)
    try:
        (row,) = read_free(FakeNvml([FakeGpu(used=GIB, processes={os.getpid(): GIB})]))
    finally:
        own.write_bytes(before.removesuffix(b"\n"))
    assert row.holders[0].name == name
