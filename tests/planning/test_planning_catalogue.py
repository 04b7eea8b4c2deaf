"""GPU types, catalogue files and simulated machines."""

from __future__ import annotations

import pytest

from pytest_multigpu.errors import UsageError
from pytest_multigpu.planning.catalogue import CATALOGUE, PRICES_GUESSED, find, merge_catalogue
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.units import GIB, MIB


def test_an_h100_is_what_the_card_reports() -> None:
    row = find("h100")
    assert row is not None
    assert row.total_bytes == 85_520_809_984
    assert row.free_bytes == 85_520_809_984 - 480 * MIB


def test_names_and_aliases_are_unique() -> None:
    names = [name.casefold() for row in CATALOGUE for name in (row.key, *row.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("spec", "totals"),
    [
        ("4xA6000", [49140 * MIB] * 4),
        ("2x80GiB", [80 * GIB] * 2),
        ("3xH100+1x24GiB", [81559 * MIB] * 3 + [24 * GIB]),
        ("2xA100-80GB", [81920 * MIB] * 2),
        (" 1 x rtx 4090 ", [24564 * MIB]),
        ("64xL4", [23034 * MIB] * 64),
        ("1x1GiB", [GIB]),
    ],
)
def test_simulated_machines(spec: str, totals: list[int]) -> None:
    machine = simulate(spec)
    assert [gpu.total_bytes for gpu in machine.visible_gpus] == totals
    assert machine.simulated == spec
    for i, gpu in enumerate(machine.gpus):
        assert (gpu.index, gpu.cuda_index, gpu.uuid) == (i, i, f"SIMULATED-{i}")
        assert gpu.free_bytes == gpu.total_bytes - gpu.reserved_bytes
        assert gpu.used_bytes == 0


HOW = "write it like 4xA6000, 2x80GiB or 3xH100+1x24GiB"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", f"'' is not a machine; {HOW}"),
        ("H100", f"'H100' is not a machine; {HOW}"),
        ("4xH100+", f"'4xH100+' is not a machine; {HOW}"),
        ("2xH100,1xA6000", f"'2xH100,1xA6000' is not a machine; {HOW}"),
        ("0xH100", "'0xH100' asks for 0 GPUs; write 1 or more"),
        ("65xH100", "'65xH100' has more than 64 GPUs; simulate at most that"),
        ("64xH100+1xL4", "'64xH100+1xL4' has more than 64 GPUs; simulate at most that"),
        (
            "2xH1000",
            f"'H1000' is no known GPU type; known: {', '.join(row.key for row in CATALOGUE)}; "
            "or a size such as 80GiB",
        ),
        ("2x80", "'80' has no unit; write 80GiB or 80MiB"),
        ("2x80XB", "'80XB' has an unknown unit; known: B, KiB, MiB, GiB, TiB, KB, MB, GB, TB"),
        ("2x1023MiB", "'1023MiB' is less than 1GiB; give the card's whole VRAM"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        simulate(spec)
    assert str(error.value) == f"--gpu-simulate: {message}"


def test_a_file_changes_and_adds_types() -> None:
    loaded = {
        "_comment_why": "ours",
        "h100": {"price": 1.99, "_comment_price": "spot"},
        "Big": {"total": 10**11, "bandwidth": 2000, "price": 1, "capability": [9, 0]},
        "A40": {"nvlink": 4},
    }
    merged = merge_catalogue(loaded, source="gpus.json")
    h100, big, a40 = find("H100", merged), find("big", merged), find("A40", merged)
    assert h100 is not None
    assert (h100.price_usd_hour, h100.price_guessed) == (1.99, None)
    assert h100.total_bytes == 81559 * MIB
    assert big is not None
    assert (big.total_bytes, big.bandwidth_gb_s, big.capability) == (10**11, 2000.0, (9, 0))
    assert big.price_guessed is None
    assert a40 is not None
    assert a40.price_guessed == PRICES_GUESSED
    assert len(merged) == len(CATALOGUE) + 1
    assert simulate("2xBig", merged).gpus[1].total_bytes == 10**11


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (
            [],
            'g.json: a catalogue is a JSON object of GPU types; write {"H100": {"price": 2.4}}',
        ),
        ({"H100": 2.4}, 'g.json: H100 is not an object; write {"price": 2.4}'),
        (
            {"H100": {"price": "2"}},
            "g.json: H100.price is '2', not a number above 0 in US dollars per hour",
        ),
        (
            {"H100": {"price": 0}},
            "g.json: H100.price is 0, not a number above 0 in US dollars per hour",
        ),
        (
            {"H100": {"bandwidth": True}},
            "g.json: H100.bandwidth is True, not a number above 0 in GB/s",
        ),
        (
            {"H100": {"total": "80GiB"}},
            "g.json: H100.total is '80GiB', not a number of bytes; write 85520809984",
        ),
        (
            {"H100": {"capability": [9]}},
            "g.json: H100.capability is [9], not a compute capability; write [9, 0]",
        ),
        (
            {"H100": {"nvlink": -1}},
            "g.json: H100.nvlink is -1; write true, false or the number of NVLinks",
        ),
        (
            {"H100": {"nvlink": 1001}},
            "g.json: H100.nvlink is 1001; write true, false or the number of NVLinks",
        ),
        (
            {"H100": {"nvlink": "18"}},
            "g.json: H100.nvlink is '18'; write true, false or the number of NVLinks",
        ),
        ({"H100": {"name": ""}}, "g.json: H100.name is ''; write the name that nvidia-smi shows"),
        (
            {"H100": {"vram": 1}},
            "g.json: H100.vram is not a known key; known: name, total, reserved, bandwidth, "
            "price, capability, nvlink",
        ),
        ({"New": {"total": 1}}, "g.json: New is a new GPU type and has no bandwidth; add it"),
        ({"New": {"bandwidth": 1}}, "g.json: New is a new GPU type and has no total; add it"),
        (
            {"H100": {"bandwidth": 10**6}},
            "g.json: H100.bandwidth is 1000000, not a number above 0 in GB/s",
        ),
        (
            {"H100": {"price": 1e-7}},
            "g.json: H100.price is 1e-07, not a number above 0 in US dollars per hour",
        ),
        (
            {"H100": {"price": None}},
            "g.json: H100.price is None, not a number above 0 in US dollars per hour",
        ),
        (
            {"H100": {"total": 0}},
            "g.json: H100.total is 0, not a number of bytes; write 85520809984",
        ),
        (
            {"H100": {"total": True}},
            "g.json: H100.total is True, not a number of bytes; write 85520809984",
        ),
        (
            {"H100": {"total": (1 << 50) + 1}},
            "g.json: H100.total is 1125899906842625, not a number of bytes; write 85520809984",
        ),
        (
            {"H100": {"reserved": -1}},
            "g.json: H100.reserved is -1, not a number of bytes; write 85520809984",
        ),
        (
            {"H100": {"capability": [9, True]}},
            "g.json: H100.capability is [9, True], not a compute capability; write [9, 0]",
        ),
        (
            {"H100": {"capability": "90"}},
            "g.json: H100.capability is '90', not a compute capability; write [9, 0]",
        ),
        ({"H100": {"name": 5}}, "g.json: H100.name is 5; write the name that nvidia-smi shows"),
        (
            {"New": {"total": 10, "reserved": 10, "bandwidth": 1}},
            "g.json: New.reserved is not below its total; give both in bytes",
        ),
        (
            {"H100": {"reserved": 10**12}},
            "g.json: H100.reserved is not below its total; give both in bytes",
        ),
    ],
)
def test_bad_catalogues(loaded: object, message: str) -> None:
    with pytest.raises(UsageError) as error:
        merge_catalogue(loaded, source="g.json")
    assert str(error.value) == message


def test_a_new_type_has_only_what_its_row_says() -> None:
    loaded = {"New": {"total": 10**9, "bandwidth": 1}}
    row = find("new", merge_catalogue(loaded, source="g.json"))
    assert row is not None
    assert (row.key, row.name, row.nvlinks) == ("New", "New", None)
    assert (row.price_usd_hour, row.capability, row.aliases) == (None, None, ())
    assert row.free_bytes == 10**9 - 503_316_480


def test_the_smallest_and_largest_values_of_a_row() -> None:
    fields = {
        "name": "N",
        "total": 1 << 50,
        "reserved": (1 << 50) - 1,
        "bandwidth": 1e-6,
        "price": 999_999.5,
        "nvlink": True,
    }
    row = find("new", merge_catalogue({"New": fields}, source="g.json"))
    assert row is not None
    assert (row.name, row.free_bytes, row.nvlinks) == ("N", 1, 1)
    assert (row.bandwidth_gb_s, row.price_usd_hour) == (1e-6, 999_999.5)
    tiny = merge_catalogue({"New": {"total": 1, "reserved": 0, "bandwidth": 1}}, source="g.json")
    assert tiny[-1].free_bytes == 1


@pytest.mark.parametrize("name", ["RTX_4090", "rtx 4090", "RTX-4090", "4090"])
def test_cards_are_found_by_how_people_write_them(name: str) -> None:
    row = find(name)
    assert row is not None
    assert row.key == "RTX4090"


def test_simulated_cards_have_their_types_nvlinks() -> None:
    spec = "1xH100+1xA100-40GB+1xA6000+1x80GiB+1xNew"
    new = {"New": {"total": 10**10, "bandwidth": 1, "nvlink": 4}}
    machine = simulate(spec, merge_catalogue(new, source="g.json"))
    assert [gpu.nvlinks for gpu in machine.gpus] == [18, 12, 0, None, 4]


def test_a_simulated_size_is_a_card_of_that_name() -> None:
    gpu = simulate("1x80GiB").gpus[0]
    assert (gpu.name, gpu.capability) == ("simulated 80GiB", None)
    assert gpu.reserved_bytes == 503_316_480
