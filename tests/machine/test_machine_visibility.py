"""CUDA_VISIBLE_DEVICES as the CUDA runtime reads it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pytest_multigpu.errors import MachineError
from pytest_multigpu.machine.fake import FakeGpu, FakeNvml
from pytest_multigpu.machine.nvml import read_machine
from pytest_multigpu.machine.visibility import (
    join_by_uuid,
    read_environment,
    read_visibility,
    visibility_of,
)
from pytest_multigpu.records.visibility import GpuEnvironment

UUIDS = ("GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333", "GPU-cccc4444")
GPUS = read_machine({}, FakeNvml([FakeGpu(uuid=uuid) for uuid in UUIDS])).gpus


@pytest.mark.parametrize(
    ("value", "visible", "faults", "mend"),
    [
        (None, (0, 1, 2, 3), (), ""),
        ("", (), (), "unset CUDA_VISIBLE_DEVICES"),
        ("0,1", (0, 1), (), ""),
        (" 3 , 1", (3, 1), (), ""),
        ("GPU-bbbb,GPU-aaaa2", (2, 1), (), ""),
        (
            "GPU-aaaa",
            (),
            ("entry 'GPU-aaaa' fits 2 GPUs: CUDA stops reading there",),
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            "GPU-cccc,GPU-cccc4",
            (),
            ("entry 'GPU-cccc4' is repeated: CUDA then sees no GPU at all",),
            "export CUDA_VISIBLE_DEVICES=GPU-cccc4444",
        ),
        (
            "GPU-cccc,GPU-dddd",
            (3,),
            ("entry 'GPU-dddd' names no GPU: CUDA stops reading there",),
            "export CUDA_VISIBLE_DEVICES=GPU-cccc4444",
        ),
        (
            "GPU-cccc,1",
            (3,),
            ("entry '1' is not a GPU UUID: CUDA stops reading there",),
            "export CUDA_VISIBLE_DEVICES=GPU-cccc4444",
        ),
        (
            "MIG-1234",
            (),
            ("CUDA_VISIBLE_DEVICES=MIG-1234 names MIG instances, not whole GPUs",),
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            "0,1,0",
            (),
            ("entry '0' is repeated: CUDA then sees no GPU at all",),
            "export CUDA_VISIBLE_DEVICES=0,1",
        ),
        (
            "-1",
            (),
            ("entry '-1' is negative: CUDA stops reading there",),
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            "2,x,1",
            (2,),
            ("entry 'x' is not a GPU index: CUDA stops reading there",),
            "export CUDA_VISIBLE_DEVICES=2,1",
        ),
        (
            "0;1",
            (0,),
            ("entry '0;1' is read as 0: CUDA knows only commas between GPUs",),
            "export CUDA_VISIBLE_DEVICES=0,1",
        ),
        (
            "2 3,1:0",
            (2, 1),
            (
                "entry '2 3' is read as 2: CUDA knows only commas between GPUs",
                "entry '1:0' is read as 1: CUDA knows only commas between GPUs",
            ),
            "export CUDA_VISIBLE_DEVICES=2,3,1,0",
        ),
        (
            "1-3",
            (1,),
            ("entry '1-3' is read as 1: CUDA knows only commas between GPUs",),
            "export CUDA_VISIBLE_DEVICES=1,2,3",
        ),
        (
            "0;9",
            (0,),
            ("entry '0;9' is read as 0: CUDA knows only commas between GPUs",),
            "export CUDA_VISIBLE_DEVICES=0",
        ),
        (
            "GPU-bbbb;GPU-cccc",
            (),
            ("entry 'GPU-bbbb;GPU-cccc' names no GPU: CUDA stops reading there",),
            "export CUDA_VISIBLE_DEVICES=GPU-bbbb3333,GPU-cccc4444",
        ),
        (
            "GPU-bbbb, GPU-cccc",
            (2,),
            ("entry ' GPU-cccc' is not a GPU UUID: CUDA stops reading there",),
            "export CUDA_VISIBLE_DEVICES=GPU-bbbb3333,GPU-cccc4444",
        ),
        (
            " GPU-bbbb",
            (),
            ("entry ' GPU-bbbb' is not a GPU index: CUDA stops reading there",),
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            "GPU-bbbb ",
            (),
            ("entry 'GPU-bbbb ' names no GPU: CUDA stops reading there",),
            "export CUDA_VISIBLE_DEVICES=GPU-bbbb3333",
        ),
        (
            "GPU-",
            (),
            ("entry 'GPU-' names no GPU: CUDA stops reading there",),
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            "0,,1",
            (0,),
            ("entry '' is empty: CUDA stops reading there",),
            "export CUDA_VISIBLE_DEVICES=0,1",
        ),
        (
            ",0",
            (),
            ("entry '' is empty: CUDA stops reading there",),
            "export CUDA_VISIBLE_DEVICES=0",
        ),
        (
            ",",
            (),
            ("entry '' is empty: CUDA stops reading there",),
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            "3,4",
            (3,),
            ("entry '4' names no GPU: CUDA stops reading there",),
            "export CUDA_VISIBLE_DEVICES=3",
        ),
    ],
)
def test_forms(
    value: str | None, visible: tuple[int, ...], faults: tuple[str, ...], mend: str
) -> None:
    found = read_visibility(value, GPUS)
    assert (found.visible, found.faults, found.mend) == (visible, faults, mend)


def test_oddities_that_change_nothing_are_notes() -> None:
    ended = read_visibility("0,2,-1,3", GPUS)
    assert (ended.visible, ended.faults) == ((0, 2), ())
    assert ended.notes == ("entry '-1' is negative: CUDA stops reading there",)
    for value in ("1gpu", "1gpu2"):
        odd = read_visibility(value, GPUS)
        assert (odd.visible, odd.faults) == ((1,), ())
        assert odd.notes == (f"entry {value!r} is read as 1",)


WHOLE = tuple(f"GPU-{number}bd3eb4c-bd2b-b846-9144-f186db7929af" for number in range(3))


@pytest.mark.parametrize(
    ("value", "visible", "faults", "notes"),
    [
        (WHOLE[1].upper(), (1,), 0, 0),
        ("GPU-2bd3eb4cbd2b", (2,), 0, 0),
        (f"{WHOLE[1]}x", (1,), 0, 1),
        (f"{WHOLE[1]};{WHOLE[2]}", (1,), 1, 0),
        (f"{WHOLE[1]},{WHOLE[1][:9]}", (), 1, 0),
    ],
)
def test_uuids_as_the_driver_reads_them(
    value: str, visible: tuple[int, ...], faults: int, notes: int
) -> None:
    """Each of these was tried on a driver, with one GPU."""
    gpus = read_machine({}, FakeNvml([FakeGpu(uuid=uuid) for uuid in WHOLE])).gpus
    found = read_visibility(value, gpus)
    assert (found.visible, len(found.faults), len(found.notes)) == (visible, faults, notes)
    if ";" in value:
        assert found.faults == (
            f"entry {value!r} is read as {WHOLE[1]}: CUDA knows only commas between GPUs",
        )
        assert found.mend == f"export CUDA_VISIBLE_DEVICES={WHOLE[1]},{WHOLE[2]}"


@pytest.mark.parametrize(
    ("value", "visible", "mend"),
    [
        ("0,1,", (0, 1), "export CUDA_VISIBLE_DEVICES=0,1"),
        ("2, , ", (2,), "export CUDA_VISIBLE_DEVICES=2"),
        ("GPU-bbbb,", (2,), "export CUDA_VISIBLE_DEVICES=GPU-bbbb3333"),
    ],
)
def test_a_comma_at_the_end_is_a_note(value: str, visible: tuple[int, ...], mend: str) -> None:
    found = read_visibility(value, GPUS)
    assert (found.visible, found.faults, found.mend) == (visible, (), mend)
    assert found.notes == ("the list ends with a comma",)


def test_mixed_cards_have_an_uncertain_order_unless_by_bus() -> None:
    mixed = read_machine({}, FakeNvml([FakeGpu(), FakeGpu(name="NVIDIA RTX A6000")])).gpus
    assert not read_visibility(None, mixed).certain_order
    assert not read_visibility("1,0", mixed).certain_order
    assert read_visibility("1,0", mixed, "PCI_BUS_ID").certain_order
    assert read_visibility("GPU-00000001", mixed).certain_order
    assert read_visibility(None, GPUS).certain_order


def test_the_machine_carries_both_indices() -> None:
    machine = read_machine({"CUDA_VISIBLE_DEVICES": "2,0"}, FakeNvml(3))
    assert machine.visible == (2, 0)
    assert [gpu.cuda_index for gpu in machine.gpus] == [1, None, 0]
    assert machine.visible_env == "2,0"


MIXED = [FakeGpu(name="NVIDIA RTX A6000", uuid="GPU-aa"), FakeGpu(uuid="GPU-bb")]


def test_of_mixed_cards_cuda_is_asked() -> None:
    """CUDA numbers the fastest first: its 0 is NVML's 1, and a mask of 0 leaves that one."""
    asked: list[Mapping[str, str]] = []

    def fastest_first(environ: Mapping[str, str]) -> tuple[str, ...]:
        asked.append(environ)
        return ("GPU-bb",) if environ.get("CUDA_VISIBLE_DEVICES") == "0" else ("GPU-bb", "GPU-aa")

    def visible(gpus: list[FakeGpu], **environ: str) -> tuple[int, ...]:
        machine = read_machine(environ, FakeNvml(gpus), ask_cuda=fastest_first)
        environment = GpuEnvironment(cuda_device_order=environ.get("CUDA_DEVICE_ORDER"))
        assert visibility_of(machine, environment).visible == machine.visible
        return machine.visible

    assert visible(MIXED) == (1, 0)
    assert visible(MIXED, CUDA_VISIBLE_DEVICES="0") == (1,)
    assert len(asked) == 2
    # By bus, by UUID, and among equal cards there is nothing to ask.
    assert visible(MIXED, CUDA_DEVICE_ORDER="PCI_BUS_ID") == (0, 1)
    assert visible(MIXED, CUDA_VISIBLE_DEVICES="GPU-aa") == (0,)
    assert visible([FakeGpu(), FakeGpu()]) == (0, 1)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (("GPU-bb",), "lists 1 of 2 GPUs"),
        (("GPU-bb", "GPU-aa"), None),
        (
            ("GPU-elsewhere", "GPU-aa"),
            "reports cuda:0 as GPU-elsewhere, which is none of the GPUs that NVML lists",
        ),
        (MachineError("did not answer within 10 s"), "did not answer within 10 s"),
    ],
)
def test_an_order_that_is_a_guess_says_why(
    answer: tuple[str, ...] | MachineError, problem: str | None
) -> None:
    def ask(environ: Mapping[str, str]) -> tuple[str, ...]:
        if isinstance(answer, MachineError):
            raise answer
        return answer

    machine = read_machine({}, FakeNvml(MIXED), ask_cuda=ask)
    assert machine.order_problem == problem
    assert machine.visible == ((1, 0) if problem is None else (0, 1))


def test_cuda_is_not_asked_where_nothing_is_visible_or_a_card_has_no_name() -> None:
    def ask(environ: Mapping[str, str]) -> tuple[str, ...]:
        raise AssertionError("asked")

    assert read_machine({"CUDA_VISIBLE_DEVICES": "7"}, FakeNvml(MIXED), ask_cuda=ask).visible == ()
    fake = FakeNvml(3)
    fake.lose(1)
    assert read_machine({}, fake, ask_cuda=ask).visible == (0, 1, 2)


def test_joining_by_uuid_takes_cudas_order() -> None:
    machine = read_machine({}, FakeNvml([FakeGpu(uuid=uuid) for uuid in UUIDS]))
    joined = join_by_uuid(machine, ["bbbb3333", "GPU-AAAA1111"])
    assert joined.visible == (2, 0)
    assert [gpu.cuda_index for gpu in joined.gpus] == [1, None, 0, None]
    with pytest.raises(MachineError) as caught:
        join_by_uuid(machine, ["dddd"])
    assert str(caught.value) == (
        "reports cuda:0 as dddd, which is none of the GPUs that NVML lists"
    )


def test_variables_that_were_left_over_are_read() -> None:
    found = read_environment({"CUDA_LAUNCH_BLOCKING": "1", "CUDA_MODULE_LOADING": "EAGER"})
    assert (found.cuda_launch_blocking, found.cuda_module_loading) == ("1", "EAGER")
    assert read_environment({}).cuda_launch_blocking is None
