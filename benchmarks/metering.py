"""The cost of metering: decode with and without the peak meter, alternating.

``python benchmarks/metering.py --rounds 60 --seconds 90 --out results/metering.json``

On a shared host a decode takes up to twice its time now and then, so many short ones are compared
in pairs, each in the other order than the one before: ``ratio`` is the median of metered over
plain, with its quartiles. Beside it what the meter's thread itself takes, which no neighbour
disturbs: the seconds of one reading of all GPUs, and their share of the time at the pace that the
thread keeps.
"""

from __future__ import annotations

import time
from statistics import median, quantiles

import _common

TOKENS = 8
READINGS = 100


def main() -> None:
    parser = _common.parser(__doc__)
    parser.set_defaults(rounds=60)
    parser.add_argument("--seconds", type=float, default=1e9, help="no pair is begun after them")
    arguments = parser.parse_args()
    from pytest_multigpu.model.generation import chat_tokens, generate
    from pytest_multigpu.model.loaded import release
    from pytest_multigpu.model.memory import PeakMeter

    gpus = _common.gpu_count()
    devices = [f"cuda:{i}" for i in range(gpus)] or ["cpu"]
    loaded = _common.load(arguments, gpus)
    meter = PeakMeter(devices)
    plain: list[float] = []
    metered: list[float] = []
    try:
        prompt = chat_tokens(loaded)
        with meter.measure("warm-up"):
            generate(loaded, prompt, TOKENS)

        def decode() -> float:
            started = time.perf_counter()
            generate(loaded, prompt, TOKENS)
            return time.perf_counter() - started

        ends = time.monotonic() + arguments.seconds
        for number in range(arguments.rounds):
            if time.monotonic() > ends:
                break
            for metering in ((False, True), (True, False))[number % 2]:
                if metering:
                    with meter.measure("decode"):
                        metered.append(decode())
                else:
                    plain.append(decode())
        reading = reading_seconds(devices)
    finally:
        release(loaded)
    ratios = [ours / theirs for ours, theirs in zip(metered, plain, strict=True)]
    _common.write(
        arguments,
        {
            "metered_s": _common.summary(metered),
            "plain_s": _common.summary(plain),
            "ratio": median(ratios),
            "ratio_quartiles": quantiles(ratios, n=4)[::2],
            **reading,
        },
    )


def reading_seconds(devices: list[str]) -> dict[str, float]:
    """One reading of every device as the meter's thread takes it, and its share of the time."""
    from pytest_multigpu.model.witness import INTERVAL_SECONDS, SHARE, Witness

    witness = Witness(devices)
    times = []
    for _ in range(READINGS):
        started = time.perf_counter()
        for device in devices:
            witness.read(device)
        times.append(time.perf_counter() - started)
    reading = median(times)
    pause = max(INTERVAL_SECONDS, reading / SHARE)
    return {"reading_s": reading, "reading_share": reading / (pause + reading)}


if __name__ == "__main__":
    main()
