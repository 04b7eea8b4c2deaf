from __future__ import annotations

import _thread
import errno
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_multigpu.errors import CheckpointError, LoadError, UsageError
from pytest_multigpu.model.config import ResolvedModel, resolve_config
from pytest_multigpu.model.failures import out_of_memory, problem
from pytest_multigpu.model.loaded import LoadedModel, release
from pytest_multigpu.model.loading import load_model
from pytest_multigpu.records.plan import Tier
from pytest_multigpu.records.progress import Progress

CPU = {"": "cpu"}


def tensors(model: Any) -> dict[str, Any]:
    """All tensors, quantisation statistics and plain buffers included."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def assert_equal(ours: Any, stock: Any) -> None:

    mine, theirs = tensors(ours), tensors(stock)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    for (name, mine_parameter), parameter in zip(
        ours.named_parameters(), stock.parameters(), strict=True
    ):
        assert type(mine_parameter) is type(parameter), name
        assert set(mine_parameter.__dict__) == set(parameter.__dict__), name


@pytest.mark.parametrize("tier", ["16bit", "8bit", "4bit"])
@pytest.mark.parametrize("weights", ["checkpoint", "synthetic"])
def test_the_fast_loader_is_bit_equal_to_stock(written: Path, tier: Tier, weights: Any) -> None:
    resolved = resolve_config(str(written))
    ours = load_model(resolved, tier=tier, device_map=CPU, weights=weights)
    stock = load_model(resolved, tier=tier, device_map=CPU, weights=weights, loader="transformers")

    assert (ours.load.loader, stock.load.loader) == ("pytest-multigpu", "transformers")
    assert (ours.load.weights, ours.load.notes) == (weights, ())
    assert_equal(ours.model, stock.model)
    assert ours.placement == stock.placement
    assert ours.load.bytes == stock.load.bytes == 2 * ours.architecture.parameters


@pytest.mark.parametrize("tier", ["16bit", "8bit", "4bit"])
def test_stock_from_pretrained_called_by_hand_gives_the_same(written: Path, tier: Tier) -> None:
    from transformers import AutoModelForCausalLM

    from pytest_multigpu.model.quantise import quantization_config

    ours = load_model(str(written), tier=tier, device_map=CPU)
    stock = AutoModelForCausalLM.from_pretrained(
        str(written),
        dtype=torch.bfloat16,
        device_map=CPU,
        quantization_config=quantization_config(tier, torch.bfloat16),
    )
    assert type(ours.model) is type(stock)
    assert_equal(ours.model, stock)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():  # bitsandbytes takes another path on the CPU with gradients
        assert torch.equal(ours.model(ids).logits, stock(ids).logits)


def test_a_checkpoint_holds_what_was_synthesised(written: Path, tiny: ResolvedModel) -> None:
    from_file = load_model(str(written), tier="16bit", device_map=CPU)
    made = load_model(tiny, tier="16bit", device_map=CPU)
    assert_equal(from_file.model, made.model)


def test_loaded_in_another_dtype_than_stored(written: Path) -> None:
    ours = load_model(str(written), tier="cpu", dtype="float32", device_map=CPU)
    stock = load_model(
        str(written), tier="cpu", dtype="float32", device_map=CPU, loader="transformers"
    )
    assert_equal(ours.model, stock.model)
    assert ours.load.loader == "pytest-multigpu"


def test_eval_mode_no_gradients_and_a_device_for_inputs(tiny: ResolvedModel) -> None:
    loaded = load_model(tiny, tier="cpu", dtype="float32", device_map=CPU)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert str(loaded.input_device) == "cpu"
    assert str(loaded.layer_device(2)) == "cpu"
    assert loaded.cuda_devices == ()
    assert len(loaded.decoder_layers) == 3
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id


def test_parts_on_the_cpu_beside_each_other_and_on_disk(written: Path) -> None:
    blocks: dict[str, int | str] = {f"model.layers.{i}": "cpu" for i in range(3)}
    blocks.update({"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"})
    blocks["model.rotary_emb"] = "cpu"
    assert (
        load_model(str(written), tier="16bit", device_map=blocks).load.loader == "pytest-multigpu"
    )

    blocks["model.layers.1"] = "disk"
    loaded = load_model(str(written), tier="16bit", device_map=blocks)
    assert loaded.load.loader == "transformers"
    assert loaded.load.notes == (
        "loaded by transformers' own loader: parts of the model are offloaded to disk",
    )
    assert loaded.placement.device_map["model.layers.1"] == "disk"
    assert loaded.placement.device_map["model.layers.2"] == "cpu"
    assert loaded.placement.parameters == loaded.architecture.parameters
    assert str(loaded.layer_device(1)) == "cpu"


def test_progress_counts_every_byte(written: Path) -> None:
    seen: list[Progress] = []
    loaded = load_model(str(written), tier="16bit", device_map=CPU, progress=seen.append)
    assert seen[-1].bytes_done == seen[-1].bytes_total == loaded.load.bytes
    assert seen[-1].seconds_left == 0.0
    assert seen[-1].gb_per_second > 0


def test_a_tied_checkpoint(tmp_path: Path, tiny: ResolvedModel) -> None:
    tied = ResolvedModel(name="tied", config_dict={**tiny.config_dict, "tie_word_embeddings": True})
    made = load_model(tied, tier="16bit", device_map=CPU)
    assert made.model.lm_head.weight is made.model.model.embed_tokens.weight
    made.model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), tier="16bit", device_map=CPU)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert_equal(loaded.model, made.model)
    assert loaded.load.loader == "pytest-multigpu"
    assert loaded.placement.parameters == made.architecture.parameters


def test_experts_that_are_stored_one_by_one_go_through_stock(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), tier="cpu", dtype="float32", device_map=CPU)
    assert loaded.load.loader == "transformers"
    assert loaded.load.notes == (
        "loaded by transformers' own loader: its weights are stored in another layout and have "
        "to be converted",
        "the checkpoint has no tokenizer; the built-in byte-level tokenizer stands in",
    )
    # Synthesised, the same model needs no conversion.
    made = load_model(
        str(tmp_path), tier="cpu", dtype="float32", device_map=CPU, weights="synthetic"
    )
    assert made.load.loader == "pytest-multigpu"
    assert made.placement.parameters == loaded.placement.parameters


def test_a_checkpoint_quantised_already_goes_through_stock(written: Path, tmp_path: Path) -> None:
    once = load_model(str(written), tier="4bit", device_map=CPU)
    once.model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), tier="4bit", device_map=CPU)
    assert again.load.loader == "transformers"
    assert again.load.notes[0] == (
        "loaded by transformers' own loader: the checkpoint is quantised already"
    )
    assert_equal_tensors(again.model, once.model)


def assert_equal_tensors(one: Any, other: Any) -> None:

    mine, theirs = tensors(one), tensors(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_no_safetensors_goes_through_stock(written: Path, tmp_path: Path) -> None:

    loaded = load_model(str(written), tier="16bit", device_map=CPU)
    torch.save(loaded.model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((written / "config.json").read_text())
    again = load_model(str(tmp_path), tier="16bit", device_map=CPU)
    assert again.load.loader == "transformers"
    assert again.load.notes[0] == (
        "loaded by transformers' own loader: it has no safetensors files"
    )
    assert_equal(again.model, loaded.model)


# -- what goes wrong --------------------------------------------------------------------------


def living_models() -> int:
    from transformers import PreTrainedModel

    gc.collect()
    return sum(
        issubclass(type(thing), PreTrainedModel) and next(thing.parameters(), None) is not None
        and next(thing.parameters()).device.type != "meta"
        for thing in gc.get_objects()
    )  # fmt: skip


@pytest.fixture
def nothing_left() -> Any:
    before = living_models()
    yield
    assert living_models() <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-")]


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


@pytest.fixture
def no_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was built although the checkpoint is damaged")

    monkeypatch.setattr("pytest_multigpu.model.loading._recipe", refuse)


@pytest.mark.usefixtures("no_model_is_built")
def test_a_truncated_shard(checkpoint: Path) -> None:
    broken = shard(checkpoint)
    size = broken.stat().st_size
    os.truncate(broken, size - 1)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(checkpoint), tier="16bit", device_map=CPU)
    assert str(caught.value) == (
        f"{broken}: truncated: {size - 1} B ({size - 1} bytes) of {size} B ({size} bytes); "
        "download it again"
    )


@pytest.mark.usefixtures("no_model_is_built")
def test_a_missing_shard(checkpoint: Path) -> None:
    broken = shard(checkpoint)
    shards = len(list(checkpoint.glob("*.safetensors")))
    broken.unlink()
    with pytest.raises(CheckpointError) as caught:
        load_model(str(checkpoint), tier="16bit", device_map=CPU)
    assert str(caught.value) == (
        f"{checkpoint}: 1 of {shards} shards missing, first {broken.name}; "
        "download the checkpoint again"
    )


@pytest.mark.usefixtures("nothing_left")
def test_a_shard_that_disappears_before_it_is_opened(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_multigpu.model import loading

    broken = shard(checkpoint)
    stock: Any = loading.__dict__["read_headers"]

    def then_gone(paths: Any) -> Any:
        headers = stock(paths)
        broken.unlink()
        return headers

    monkeypatch.setattr(loading, "read_headers", then_gone)
    with pytest.raises((CheckpointError, LoadError)) as caught:
        load_model(str(checkpoint), tier="16bit", device_map=CPU)
    assert broken.name in str(caught.value)


def test_a_shard_deleted_while_it_is_read_is_no_harm(
    checkpoint: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def delete_first(*arguments: Any) -> int:
        shard(checkpoint).unlink(missing_ok=True)
        monkeypatch.setattr(os, "preadv", read)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", delete_first)
    loaded = load_model(str(checkpoint), tier="16bit", device_map=CPU)
    assert_equal(loaded.model, load_model(str(written), tier="16bit", device_map=CPU).model)


def failing_read(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], int]) -> None:
    """The ``at``-th read calls ``act`` instead."""
    read, count = os.preadv, [0]

    def preadv(*arguments: Any) -> int:
        count[0] += 1
        return act() if count[0] == at else read(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("tier", ["16bit", "8bit", "4bit"])
@pytest.mark.parametrize("at", [1, 12])
def test_a_disk_error(written: Path, monkeypatch: pytest.MonkeyPatch, tier: Tier, at: int) -> None:
    def fail() -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    failing_read(monkeypatch, at, fail)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(written), tier=tier, device_map=CPU)
    text = str(caught.value)
    assert text.startswith(f"{written}/model-0000")
    assert text.endswith("failed: Input/output error; check the disk, or download the file again")


@pytest.mark.usefixtures("nothing_left")
def test_a_file_that_shrinks_while_it_is_read(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_read(monkeypatch, 3, lambda: 0)
    with pytest.raises(CheckpointError, match="it has become shorter since loading began"):
        load_model(str(written), tier="16bit", device_map=CPU)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("tier", ["16bit", "8bit"])
@pytest.mark.parametrize("at", [1, 9, 20])
def test_an_interrupt(written: Path, monkeypatch: pytest.MonkeyPatch, tier: Tier, at: int) -> None:
    stopped = threading.Event()

    def interrupt() -> int:
        _thread.interrupt_main()
        stopped.wait(5)  # this read never ends by itself
        raise OSError(errno.EINTR, "gave up")

    failing_read(monkeypatch, at, interrupt)
    threading.Timer(0.2, stopped.set).start()
    with pytest.raises(KeyboardInterrupt):
        load_model(str(written), tier=tier, device_map=CPU)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("loader", ["auto", "transformers"])
def test_tensors_missing_from_the_checkpoint(checkpoint: Path, loader: Any) -> None:
    import safetensors.torch

    for path in checkpoint.glob("*.safetensors"):
        held = safetensors.torch.load_file(path)
        held.pop("model.layers.1.mlp.up_proj.weight", None)
        safetensors.torch.save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_model(str(checkpoint), tier="16bit", device_map=CPU, loader=loader)
    assert str(caught.value) == (
        f"{checkpoint}: 1 of the model's tensors are not in the checkpoint, first "
        "model.layers.1.mlp.up_proj.weight; download it again, or give the config.json that "
        "belongs to it"
    )


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("tier", ["16bit", "4bit"])
def test_shapes_that_do_not_belong_to_the_config(checkpoint: Path, tier: Tier) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    with pytest.raises(CheckpointError) as caught:
        load_model(str(checkpoint), tier=tier, device_map=CPU)
    assert str(caught.value).endswith(
        "model.layers.0.mlp.down_proj.weight has the shape [128, 256], the model's config.json "
        "says [128, 192]; the two do not belong together"
    )


def test_tensors_that_the_model_has_no_use_for_are_noted(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    loaded = load_model(str(checkpoint), tier="16bit", device_map=CPU)
    assert loaded.load.notes == (
        "9 tensors of the checkpoint are not used by the model, first "
        "model.layers.2.input_layernorm.weight",
    )


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("tier", ["8bit", "4bit"])
def test_an_error_while_quantising_is_the_one_shown(
    written: Path, monkeypatch: pytest.MonkeyPatch, tier: Tier
) -> None:
    import bitsandbytes as bnb

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 448.00 MiB. GPU 1 has a total capacity of "
            "79.18 GiB of which 12.06 MiB is free."
        )

    name = "quantize_4bit" if tier == "4bit" else "int8_vectorwise_quant"
    monkeypatch.setattr(bnb.functional, name, fail)
    with pytest.raises(LoadError) as caught:
        load_model(str(written), tier=tier, device_map=CPU)
    assert str(caught.value) == (
        "GPU 1: out of memory while loading: 448.00 MiB wanted, 12.06 MiB free; plan for the "
        "free memory or free it (nvidia-smi shows who holds it)"
    )


def test_an_out_of_memory_text_without_numbers() -> None:
    assert out_of_memory(RuntimeError("CUDA out of memory")) == (
        "out of memory while loading; plan for the free memory or free it (nvidia-smi shows who "
        "holds it)"
    )


LARGER_THAN_THE_HOST = """
import gc, resource, sys, threading
from pathlib import Path
from pytest_multigpu.errors import LoadError
from pytest_multigpu.model.loading import load_model

def load(folder):
    load_model(folder, tier="cpu", device_map={"": "cpu"}, weights="checkpoint")

def data_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmData")).split()[1]) * 1024

load(sys.argv[1])  # imports, and starts the threads that stay
gc.collect()
threading.stack_size(1 << 18)  # else it is the readers' stacks that find no memory
before = data_bytes()
one_of_two = before + 100_000_000
resource.setrlimit(resource.RLIMIT_DATA, (one_of_two, resource.RLIM_INFINITY))
try:
    load(sys.argv[2])
except LoadError as error:
    print(error)
print(data_bytes() < before + 10_000_000)
"""


def test_a_checkpoint_larger_than_the_host_s_memory(written: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    shape = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 512}
    config = {"model_type": "llama", **shape, "num_hidden_layers": 1, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path), tier="cpu", device_map=CPU, weights="synthetic")
    loaded.model.save_pretrained(large)
    # In a process of its own: what this one has garbage of would be room under the limit.
    done = subprocess.run(
        [sys.executable, "-c", LARGER_THAN_THE_HOST, str(written), str(large)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.splitlines() == [
        f"{large}: the host is out of memory while loading: 62.5 MiB wanted; place every layer "
        "on a GPU (--gpu-plan shows what is on cpu), or free the host's memory",
        "True",
    ], done.stderr


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_the_host_s_memory_ends_in_other_ways(error: Exception) -> None:
    assert str(problem(error, None, "game")) == (
        "game: the host is out of memory while loading; place every layer on a GPU (--gpu-plan "
        "shows what is on cpu), or free the host's memory"
    )


def test_a_file_that_cannot_be_mapped() -> None:
    text = "unable to mmap 1172321704 bytes from file <a.safetensors>: Cannot allocate memory (12)"
    assert str(problem(RuntimeError(text), None, "game")) == (
        "game: the host is out of memory while loading: 1.1 GiB wanted; place every layer on a GPU "
        "(--gpu-plan shows what is on cpu), or free the host's memory"
    )


def test_other_errors_of_the_system_are_told_as_they_are() -> None:
    assert str(problem(OSError(errno.EIO, "Input/output error"), None, "game")) == (
        "game: OSError while loading: [Errno 5] Input/output error"
    )


def test_a_checkpoint_that_is_not_there(tiny: ResolvedModel) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(tiny, tier="16bit", device_map=CPU, weights="checkpoint")
    assert str(caught.value) == (
        "--gpu-weights=checkpoint: 'tiny' has no checkpoint on this machine; give the folder that "
        "holds it with --gpu-model, or use --gpu-weights=synthetic"
    )


@pytest.mark.parametrize("tier", ["16bit", "8bit", "4bit"])
def test_release_frees_the_weights_though_the_record_lives_on(written: Path, tier: Tier) -> None:
    import weakref

    loaded = load_model(str(written), tier=tier, device_map=CPU)
    model = loaded.model
    model(__import__("torch").arange(3, 9)[None])  # int8 statistics move at the first forward
    watched = [weakref.ref(parameter) for parameter in model.parameters()]
    release(loaded)
    release(loaded)
    assert loaded.model is None
    gc.collect()
    # Even a reference to the module itself, as in a failed test's traceback, keeps no weight.
    assert [ref for ref in watched if ref() is not None] == []
    assert len(list(model.parameters())) == 0


@pytest.mark.parametrize(
    ("devices", "path"),
    [
        (["cuda:0"] * 4, (0,)),
        (["cuda:0", "cuda:0", "cuda:1", "cuda:1"], (0, 1, 0)),
        (["cuda:2", "cuda:0", "cuda:1", "cuda:1"], (2, 0, 1, 2)),
        (["cuda:1", "cpu", "cuda:1", "cuda:1"], (1,)),
        (["cpu"] * 4, ()),
    ],
)
def test_the_way_of_activations(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], path: tuple[int, ...]
) -> None:
    monkeypatch.setattr(LoadedModel, "layer_device", lambda _, index: torch.device(devices[index]))
    loaded = LoadedModel(
        model=None,
        tokenizer=None,
        architecture=SimpleNamespace(layers=4),  # type: ignore[arg-type]
        plan=None,
        placement=None,  # type: ignore[arg-type]
        load=None,  # type: ignore[arg-type]
    )
    assert loaded.cuda_path == path


def test_max_memory_reaches_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import accelerate as planner

    given: list[object] = []
    real = planner.get_balanced_memory

    def seen(*args: Any, **kwargs: Any) -> Any:
        caps = kwargs["max_memory"]
        given.append(None if caps is None else dict(caps))  # its texts are replaced in place
        return real(*args, **kwargs)

    monkeypatch.setattr(planner, "get_balanced_memory", seen)
    limits: list[dict[int | str, int | str] | None] = [{"cpu": "1GiB"}, None]
    for caps in limits:
        loaded = load_model("tiny-llama", tier="16bit", device_map="auto", max_memory=caps)
        assert set(loaded.placement.device_map.values()) == {"cpu"}
        release(loaded)
    assert given == limits
