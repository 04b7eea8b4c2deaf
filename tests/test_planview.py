"""``--gpu-plan`` for models unlike Llama, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BLOOM_7B = {
    "model_type": "bloom",
    "vocab_size": 250880,
    "hidden_size": 4096,
    "n_layer": 30,
    "n_head": 32,
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def plan(pytester: pytest.Pytester, config: dict[str, object], *arguments: str) -> Any:
    folder = pytester.mkdir("model")
    (folder / "config.json").write_text(json.dumps(config))
    return pytester.runpytest_subprocess(
        "--gpu-plan", f"--gpu-model={folder}", "--gpu-placement=balanced", *arguments
    )


def test_eager_attention_that_does_not_fit_is_no_green(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    """13.2 GiB of weights and 3.8 of KV fit; 32 score matrices of 8176 x 8176, 4.0 GiB in 16 bit
    and in fp32 twice that, do not. Counted as Llama's it would peak at 18.8 GiB."""
    result = plan(
        pytester,
        BLOOM_7B,
        "--gpu-simulate=1x24GiB",
        "--gpu-tier=16bit",
        "--gpu-context=8192",
        f"--gpu-report={tmp_path}",
    )
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["* in 16bit (bfloat16, eager attention): 13.2 GiB of weights, *", "the plan does not fit"]
    )
    found = json.loads((tmp_path / "report.json").read_text())["plan"]
    (device,) = found["devices"]
    scores = 32 * 8176 * 8176
    assert device["parts"]["prefill"]["activations_bytes"] > scores * (2 + 2 + 4)
    assert found["attention"] == "eager"
    assert found["unknown"] == []
