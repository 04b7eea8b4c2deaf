"""Decode at lengths not met before, beside a repeat, with and without cuDNN attention.

``python benchmarks/attention_plans.py --out results/attention_plans.json``
"""

from __future__ import annotations

import contextlib

import _common


def main() -> None:
    arguments = _common.parser(__doc__).parse_args()
    from pytest_multigpu.model.generation import chat_tokens, generate, without_cudnn_attention
    from pytest_multigpu.model.loaded import release

    loaded = _common.load(arguments, _common.gpu_count())
    figures: dict[str, list[float]] = {}
    try:
        text = chat_tokens(loaded) * 8
        generate(loaded, text[:64], 4)
        for number in range(arguments.rounds):
            for name in ("as is", "cuDNN off"):
                # New lengths for every round and side.
                length = 128 + 16 * (2 * number + (name == "cuDNN off"))
                prompt = (text * 8)[:length]
                off = without_cudnn_attention() if name != "as is" else contextlib.nullcontext()
                with off:
                    for which in ("first", "repeat"):
                        step = generate(loaded, prompt, 9)[2].step_seconds
                        figures.setdefault(f"{name}, {which}", []).append(step or 0.0)
    finally:
        release(loaded)
    medians = {name: _common.summary(seconds) for name, seconds in figures.items()}
    ratio = medians["as is, first"]["median"] / medians["as is, repeat"]["median"]
    _common.write(arguments, {"seconds_per_token": medians, "first_over_repeat": ratio})


if __name__ == "__main__":
    main()
