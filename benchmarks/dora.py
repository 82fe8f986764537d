"""What a training makes of DoRA's magnitudes on the real model: `python -m benchmarks.dora`.

Each method trains on the example at its default rate, in one process. Printed are the size of m / norm - 1 by the
paper's equation, how what the forward pass multiplies by correlates with it, which part of all outputs it multiplies by
exactly one, and the held-out loss, as it is trained and as evaluation loads the published files. Five minutes.
"""

import argparse
import random
from pathlib import Path

from components.config import config_file
from components.prepare.rows import example_rows
from ray_jobs import entry
from ray_jobs.training import zero
from tests.models.magnitudes import measured

CONFIG = Path(__file__).parents[1] / "pipelines" / "configs" / "icd10.toml"
HELD_OUT = 200
METHODS = ("dora", "qdora", "dvora")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dora", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of 4 records")
    options = parser.parse_args()
    entry.quiet_libraries()
    zero.prepare_environment(use_gpu=False)
    settings = {"train.max_steps": options.steps, "train.batch_size": 4, "ray.num_workers": 1}
    settings |= {"train.micro_batch_size": 4}
    rows = random.Random(0).sample(list(example_rows()), HELD_OUT + options.steps * 4 * 8 // 7 + 8)
    print(f"{'':<8}{'rate':>9}{'size':>11}{'correlation':>13}{'lost':>8}{'loss':>10}{'as loaded':>10}")
    for name in options.methods:
        config = config_file.load(
            CONFIG, [*(f"{key}={value}" for key, value in settings.items()), f"method.name={name}"]
        )
        config = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": None})})
        found = measured(config_file.dumps(config), rows[HELD_OUT:], rows[:HELD_OUT])
        print(
            f"{name:<8}{config.learning_rate:>9.0e}{found.true_rms:>11.2e}{found.correlation:>13.4f}"
            f"{found.share_lost:>8.1%}{found.loss_as_trained:>10.5f}{found.loss_as_loaded:>10.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
