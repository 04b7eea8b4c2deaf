"""Every refused plan has a remedy, and each remedy, once followed, is a plan that fits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tiny_families import DEEPSEEK

from pytest_multigpu.options import Settings
from pytest_multigpu.planbook import PlanBook
from pytest_multigpu.planning.grown import GROWS
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Plan
from pytest_multigpu.units import GIB

MACHINES = (
    "1xT4", "1xV100", "1x2GiB", "1x3GiB", "2x2GiB", "3x3GiB", "1x4GiB+1x2GiB", "1xL4+1xT4",
    "busy 1x6GiB", "busy 1x4GiB+1x2GiB", "busy 1xL4+1xT4",
)  # fmt: skip
ASKED = ((2048, 1), (4096, 12), (200_000, 1))


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def followed(text: str, settings: Settings, machine: Machine) -> Plan:
    """The plan once somebody did what a remedy says."""
    changes: dict[str, Any] = dict(re.findall(r"--gpu-(\w+)=(\S+?):? ", f"{text} "))
    for number in changes.keys() & {"context", "batch"}:
        changes[number] = int(changes[number])
    if changes.get("tier") == "fp16":
        changes |= {"tier": "16bit", "dtype": "float16"}
    if text.startswith(GROWS):
        assert not machine.expandable_segments
        machine = replace(machine, expandable_segments=True)
        changes |= {"context": settings.context}
    alike = re.match(r"rent (\d+) x (.+?): with ", text)
    named = re.match(r"rent (\d+x\S+): with ", text)
    if alike:
        card = next(gpu for gpu in machine.gpus if gpu.name == alike[2])
        cards = [replace(card, index=i, cuda_index=i) for i in range(int(alike[1]))]
        machine = Machine(gpus=tuple(cards), visible=tuple(range(len(cards)))).idle()
    elif named:
        machine = simulate(named[1])
    elif text.endswith("free their memory"):
        assert machine != machine.idle()
        machine = machine.idle()
    else:
        assert changes, text
    return PlanBook(replace(settings, **changes), machine, os.environ).chosen


@pytest.mark.parametrize("spec", MACHINES)
def test_every_refused_plan_has_remedies_and_they_work(spec: str) -> None:
    machine, refused = simulate(spec.removeprefix("busy ")), 0
    if spec.startswith("busy "):
        gpus = [
            replace(gpu, free_bytes=gpu.free_bytes // 5, used_bytes=gpu.free_bytes * 4 // 5)
            for gpu in machine.gpus
        ]
        machine = replace(machine, gpus=tuple(gpus))
    tiers: tuple[Any, ...] = ("auto", "16bit", "4bit")
    for tier, placement, (context, batch) in product(tiers, ("auto", "balanced"), ASKED):
        settings = Settings(
            model="llama-3.2-1b", tier=tier, placement=placement, context=context, batch=batch
        )
        plan = PlanBook(settings, machine, os.environ).chosen
        if plan.fits:
            assert plan.remedies == ()
            continue
        refused += 1
        offers = [text for text in plan.remedies if not text.startswith("from_pretrained(")]
        assert offers, settings
        for text in offers:
            assert followed(text, settings, machine).fits, (settings, text)
    assert refused


def test_each_kind_of_remedy_in_words() -> None:
    def offers(spec: str, **asked: Any) -> tuple[str, ...]:
        settings = Settings(**{"model": "llama-3.1-8b", "tier": "16bit", **asked})
        return PlanBook(settings, simulate(spec), os.environ).chosen.remedies

    context, more = offers("1x24GiB", placement="balanced", context=100_000)
    assert re.fullmatch(
        r"--gpu-context=\d+ fits: GPU 0 would peak at 23\.\d GiB of 23\.5 GiB", context
    )
    assert re.fullmatch(
        r"rent 5 x simulated 24GiB: with --gpu-placement=balanced "
        r"GPU 3 would peak at \d\d\.\d GiB of 23\.5 GiB",
        more,
    )
    fewer = offers("1x24GiB", placement="balanced", context=2048, batch=64)[1]
    assert re.fullmatch(
        r"--gpu-batch=\d+ fits: GPU 0 would peak at 2\d\.\d GiB of 23\.5 GiB", fewer
    )
    assert offers("2xT4")[0].startswith(
        "--gpu-tier=fp16 --gpu-placement=balanced fits: GPU 0 would peak at "
    )
    (shorter,) = offers("1x80GiB", context=200_000)[:1]
    assert shorter == "--gpu-context=131072 is the longest that fits as placed"
    # Where fewer sequences fit here, no machine is named for them.
    few = offers("4xH100", model="llama-3.3-70b", tier="4bit", context=131_072, batch=64)
    assert [text.partition(" fits")[0] for text in few][-1].endswith("--gpu-batch=1")
    assert not any(text.startswith("rent ") for text in few)
    rent = offers("1xT4", context=200_000)[-1]
    assert re.fullmatch(
        r"rent \dx\S+: with --gpu-context=131072 --gpu-placement=balanced "
        r"GPU \d would peak at \d+\.\d GiB of \d+\.\d GiB",
        rent,
    )


def test_where_int8_refuses_a_model_other_tiers_are_offered(tmp_path: Path) -> None:
    """Not for want of memory, so a better tier comes first; nothing is rented for it."""
    config = {
        **DEEPSEEK,
        "model_type": "deepseek_v3",
        "vocab_size": 300,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = Settings(model=str(tmp_path), tier="8bit", context=256)
    machine = simulate("1xH100")
    plan = PlanBook(settings, machine, os.environ).chosen
    assert plan.reasons == (
        "LLM.int8 takes inputs of two or three dimensions; "
        "DeepseekV3ForCausalLM gives kv_b_proj four",
    )
    assert plan.mendable  # no other machine would do
    (offer,) = plan.remedies
    assert offer.startswith("--gpu-tier=16bit --gpu-placement=balanced fits: GPU 0 would peak at ")
    assert followed(offer, settings, machine).fits


@pytest.mark.parametrize(
    ("tier", "placement", "changes"),
    [("4bit", "balanced", ""), ("4bit", "auto", ""), ("8bit", "auto", " --gpu-placement=balanced")],
)
def test_expandable_segments_are_offered_where_they_would_do(
    tier: Any, placement: str, changes: str
) -> None:
    machine = simulate("1xH100")
    context, batch = (8192, 8) if tier == "4bit" else (15_000, 1)
    asked = Settings(tier=tier, placement=placement, context=context, batch=batch)
    plan = PlanBook(asked, machine, os.environ).chosen
    assert (plan.fits, plan.mendable) == (False, True)
    first, *others = plan.remedies
    assert re.fullmatch(
        rf"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True{changes} fits: "
        r"GPU 0 would peak at 7[78]\.\d GiB of 79\.2 GiB",
        first,
    )
    assert followed(first, asked, machine).fits
    # Neither another machine, nor the same once more where they are on and do not suffice.
    assert not [text for text in others if text.startswith("rent ")]
    grows = replace(machine, expandable_segments=True)
    more = PlanBook(replace(asked, context=context * 2), grows, os.environ).chosen
    assert not more.fits
    assert not [text for text in more.remedies if "expandable" in text]


def test_idle_gpus_are_not_to_be_freed() -> None:
    """One large card and a small one: two of the large kind would do, and are not there."""
    machine = simulate("1x12GiB+1x6GiB")
    settings = Settings(model="llama-3.1-8b", tier="16bit", placement="balanced", context=8192)
    plan = PlanBook(settings, machine, os.environ).chosen
    assert not plan.fits
    assert not [text for text in plan.remedies if "free their memory" in text]
    assert plan.remedies[-1].startswith("rent 2 x simulated 12GiB: with --gpu-placement=balanced ")
    # Somebody's display takes some: nothing to speak of.
    little = [replace(gpu, used_bytes=2**25) for gpu in machine.gpus]
    plan = PlanBook(settings, replace(machine, gpus=tuple(little)), os.environ).chosen
    assert not [text for text in plan.remedies if "free their memory" in text]
    held = [replace(gpu, free_bytes=GIB, used_bytes=gpu.free_bytes - GIB) for gpu in machine.gpus]
    tight = replace(settings, tier="4bit", context=512)
    plan = PlanBook(tight, replace(machine, gpus=tuple(held)), os.environ).chosen
    assert plan.remedies[-1] == (
        "1 x simulated 12GiB with nothing else on them would do with --gpu-placement=balanced: "
        "free their memory"
    )
