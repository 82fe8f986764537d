"""LoftQ's split against PEFT's way of it, as ratios: `python -m benchmarks.loftq`.

Both alternate equally often on the same NF4 weights, with double quantisation, on the layer shapes of the example's
base. PEFT decomposes each residual by its own `_low_rank_decomposition`, a full SVD; what surrounds it in PEFT 0.21
(`loftq_init`) runs on CUDA and XPU alone and is written out here.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors import safe_open

from benchmarks import example
from components.config import config_file
from pipelines.configs import DEFAULT_CONFIG
from ray_jobs import entry
from ray_jobs.adapters.loftq import quantize, split
from ray_jobs.base import base_model

STEPS = 5
LAYERS = [
    f"model.layers.{block}.{layer}"
    for block in (4, 22)
    for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]


def main() -> None:
    options = example.parser("loftq", __doc__, threads=1, rounds=3).parse_args()
    entry.quiet_libraries()
    torch.set_num_threads(options.threads)
    base = base_model.resolve(config_file.load(DEFAULT_CONFIG).model)
    with safe_open(next(base.path.glob("*.safetensors")), framework="pt") as file:
        weights = {name: file.get_tensor(f"{name}.weight") for name in LAYERS}
    for rank in (16, 64):
        seconds = {"split": 0.0, "peft": 0.0, "quantize": 0.0}
        lost = {"split": 0.0, "peft": 0.0, "nf4": 0.0}
        for name, weight in weights.items():
            sides: dict[str, Callable[[], Any]] = {
                "split": partial(split, weight, rank=rank, steps=STEPS, name=name),
                "peft": partial(_peft, weight, rank),
                "quantize": lambda weight=weight: [quantize(weight) for _ in range(STEPS)],
            }
            best, results = dict.fromkeys(seconds, float("inf")), dict[str, Any]()
            for _ in range(options.rounds):
                for side, run in sides.items():
                    started = time.perf_counter()
                    results[side] = run()
                    best[side] = min(best[side], time.perf_counter() - started)
            seconds = {side: seconds[side] + best[side] for side in seconds}
            lost["nf4"] += results["split"].nf4_norm2
            lost["split"] += results["split"].loftq_norm2
            lost["peft"] += results["peft"]
        ours, theirs = ((lost[side] / lost["nf4"]) ** 0.5 for side in ("split", "peft"))
        both = seconds["quantize"]
        ratio = seconds["peft"] / seconds["split"]
        alone = (seconds["peft"] - both) / (seconds["split"] - both)
        print(
            f"rank {rank:3}, {STEPS} steps: {ratio:.1f} x as fast as PEFT's full SVD, "
            f"{alone:.1f} x without the quantising both do; of NF4's loss it leaves {ours:.4f}, PEFT {theirs:.4f}",
            flush=True,
        )


def _peft(weight: torch.Tensor, rank: int) -> float:
    """PEFT 0.21's `loftq_init` on this machine's NF4: the squared norm of what it loses."""
    weight = weight.float()
    residual, norm2 = weight, 0.0
    for _ in range(STEPS):
        residual = weight - quantize(residual)[1]
        found = _low_rank_decomposition(residual, reduced_rank=rank)
        product = torch.mm(found["L"], found["R"])
        norm2 = (residual - product).double().square().sum().item()
        residual = weight - product
    return norm2


if __name__ == "__main__":
    main()
