"""Each method's best learning rate relative to LoRA's, on the example: `python -m benchmarks.learning_rates`.

Where no paper has measured it, `relative_rate` in the table of methods comes from here. Every method trains on the
same records of the example, with its own default rank, at rates half a decade apart; the best has the lowest held-out
loss. A short training of a small model shows the decade and no more: tune the rate on your own task.
"""

import argparse
import math
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from components.config import config_file
from components.config.methods import METHODS
from components.prepare.rows import example_rows
from pipelines.local import seaweedfs, server
from tests.models.train_group import train

CONFIG = Path(__file__).parents[1] / "pipelines" / "configs" / "icd10.toml"
BUCKET = "rates"
# Half-decade grids wide enough for the best to lie inside.
EXPONENTS = {"lora": range(-7, -3), "dora": range(-7, -3), "vera": range(-4, 0), "dvora": range(-4, 0)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_rates", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps of 16 records")
    options = parser.parse_args()
    # Seven eighths are trained on, the rest held out.
    rows = random.Random(0).sample(list(example_rows()), options.steps * 16 * 8 // 7 + 8)
    methods = ["lora", *(name for name in options.methods if name != "lora")]
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fineloop-rates-") as scratch:
        running = server.start(seaweedfs.SeaweedFS(Path(scratch) / "store", BUCKET))
        os.environ.update(seaweedfs.Endpoint.read(running.endpoint).environment())
        try:
            for name in methods:
                losses = {}
                for exponent in EXPONENTS[METHODS[name].adapter]:
                    rate = float(f"{10 ** (exponent / 2):.2g}")
                    losses[rate] = _held_out_loss(name, rate, options.steps, rows, Path(scratch) / f"{name}-{rate}")
                    print(f"{name:>8}  rate {rate:8.1e}  held-out loss {losses[rate]:.3f}", flush=True)
                best[name] = min(losses, key=losses.__getitem__)
        finally:
            running.stop()
    for name in methods:
        print(f"{name:>8}  best rate {best[name]:8.1e}, {best[name] / best['lora']:5.2f} x LoRA's")


def _held_out_loss(name: str, rate: float, steps: int, rows: list[dict[str, Any]], directory: Path) -> float:
    """After the last step; infinite for a training that diverged."""
    settings = {
        "method.name": name,
        "train.learning_rate": rate,
        "train.max_steps": steps,
        "train.evals_per_epoch": 0,
        "train.checkpoint_every_steps": 0,
        "registry.bucket": BUCKET,
    }
    config = config_file.load(CONFIG, [f"{key}={value}" for key, value in settings.items()])
    try:
        trained = train(config_file.dumps(config), rows, directory, run_id=directory.name, num_workers=2)
    except RuntimeError as exc:
        if "training diverged" not in str(exc):
            raise
        return math.inf
    return trained.eval_losses[-1]


if __name__ == "__main__":
    main()
