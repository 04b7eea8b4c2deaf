"""The cost of metering: decode with and without the peak meter, alternating.

``python benchmarks/metering.py --out results/metering.json``
"""

from __future__ import annotations

import time

import _common


def main() -> None:
    arguments = _common.parser(__doc__).parse_args()
    from pytest_multigpu.model.generation import chat_tokens, generate
    from pytest_multigpu.model.loaded import release
    from pytest_multigpu.model.memory import PeakMeter

    gpus = _common.gpu_count()
    loaded = _common.load(arguments, gpus)
    meter = PeakMeter([f"cuda:{i}" for i in range(gpus)] or ["cpu"])
    plain: list[float] = []
    metered: list[float] = []
    try:
        prompt = chat_tokens(loaded)
        with meter.measure("warm-up"):
            generate(loaded, prompt, 32)

        def decode() -> float:
            started = time.perf_counter()
            generate(loaded, prompt, 32)
            return time.perf_counter() - started

        for number in range(arguments.rounds):
            for metering in ((False, True), (True, False))[number % 2]:
                if metering:
                    with meter.measure("decode"):
                        metered.append(decode())
                else:
                    plain.append(decode())
    finally:
        release(loaded)
    ours, theirs = _common.summary(metered), _common.summary(plain)
    ratio = ours["median"] / theirs["median"]
    _common.write(arguments, {"metered_s": ours, "plain_s": theirs, "ratio": ratio})


if __name__ == "__main__":
    main()
