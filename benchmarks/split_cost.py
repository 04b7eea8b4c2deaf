"""The cost of splitting: one model over 1, 2 and 4 GPUs, prefill and decode.

``python benchmarks/split_cost.py --model llama-3.1-8b --out results/split_cost.json``
"""

from __future__ import annotations

import _common


def main() -> None:
    arguments = _common.parser(__doc__).parse_args()
    from pytest_multigpu.errors import LoadError
    from pytest_multigpu.model.generation import chat_tokens, generate
    from pytest_multigpu.model.loaded import release

    there = _common.gpu_count()
    splits = {}
    for gpus in [n for n in (1, 2, 4) if n <= there] or [0]:
        try:
            loaded = _common.load(arguments, gpus)
        except LoadError as error:
            splits[str(gpus)] = {"not measured": str(error)}
            continue
        try:
            text = chat_tokens(loaded)
            prompt = (text * 30)[:1024]
            generate(loaded, prompt, 12)
            runs = [generate(loaded, prompt, 12)[2] for _ in range(arguments.rounds)]
        finally:
            release(loaded)
        splits[str(gpus)] = {
            "prefill_seconds": _common.summary([run.prefill_seconds for run in runs]),
            "decode_seconds": _common.summary([run.step_seconds or 0.0 for run in runs]),
        }
    _common.write(arguments, {"prompt_tokens": 1024, "gpus": splits})


if __name__ == "__main__":
    main()
