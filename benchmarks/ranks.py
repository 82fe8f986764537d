"""How large an update is at each rank, at the default rate and alpha: `python -m benchmarks.ranks`.

Trains the example's real model in one process for each, and prints |s B A| / |W| over all adapted layers. rsLoRA's is
to be the same at every rank (arXiv:2312.03732); LoRA's, whose scaling is two at every rank, grows. Four minutes.
"""

import argparse
import random
from pathlib import Path

from components.config import config_file
from components.prepare.rows import example_rows
from ray_jobs import entry
from ray_jobs.training import zero
from tests.models.ranks import relative_size

CONFIG = Path(__file__).parents[1] / "pipelines" / "configs" / "icd10.toml"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=("rslora", "lora"), default=["rslora", "lora"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps of 4 records")
    options = parser.parse_args()
    entry.quiet_libraries()
    zero.prepare_environment(use_gpu=False)
    rows = random.Random(0).sample(list(example_rows()), options.steps * 4 * 8 // 7 + 8)
    settings = {"train.max_steps": options.steps, "train.batch_size": 4, "train.micro_batch_size": 4}
    settings |= {"ray.num_workers": 1}
    for name in options.methods:
        for rank in options.ranks:
            changes = [*(f"{key}={value}" for key, value in settings.items()), f"method.name={name}"]
            config = config_file.load(CONFIG, [*changes, f"method.rank={rank}"])
            config = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": None})})
            size = relative_size(config_file.dumps(config), rows)
            print(f"{name:>8}  rank {rank:4}  alpha {config.method.lora_alpha:5g}  size {size:.5f}", flush=True)


if __name__ == "__main__":
    main()
