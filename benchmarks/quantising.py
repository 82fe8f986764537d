"""NF4 on processors against bitsandbytes' own way, as a ratio: `python -m benchmarks.quantising`.

Weights of a layer of the example's base and of one of a model of 7 billion, each side in turn in one process; what they
find is equal to the bit (tests/ray_jobs/base/test_base_formats.py).
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import baselines, example
from ray_jobs.base import four_bits

SHAPES = {"1,536 x 576": (1536, 576), "11,008 x 4,096": (11008, 4096)}


def main() -> None:
    options = example.parser("quantising", __doc__, threads=1, rounds=3, record=True).parse_args()
    torch.set_num_threads(options.threads)
    # Until ours is registered, which nobody does here.
    sides: dict[str, Callable[..., Any]] = {
        "bitsandbytes": torch.ops.bitsandbytes.quantize_4bit.default,
        "fineloop": four_bits.quantize_4bit,
    }
    for name, shape in SHAPES.items():
        weight = (0.05 * torch.randn(shape)).bfloat16()
        best = dict.fromkeys(sides, float("inf"))
        for _ in range(options.rounds):
            for side, quantize in sides.items():
                began = time.perf_counter()
                quantize(weight, 64, "nf4", torch.uint8)
                best[side] = min(best[side], (time.perf_counter() - began) / weight.numel())
        ratio = best["bitsandbytes"] / best["fineloop"]
        ns_per_weight = ", ".join(f"{side} {seconds * 1e9:.1f} ns" for side, seconds in best.items())
        print(f"{name} weights, {options.threads} threads: {ns_per_weight} a weight, {ratio:.1f} x as fast", flush=True)
        print(baselines.compared(f"quantising {name}", ratio, record=options.record))


if __name__ == "__main__":
    main()
