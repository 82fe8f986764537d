"""What adapters forget, and what it costs to see it: `python -m benchmarks.forgetting`.

Trains the example's real model in one process at each rate. As an evaluation does, it reads general text, and what the
base answers to general prompts, with the base and with each adapter on it, and prints the seconds that took and by how
much the loss rose: on the base's own answers, that is the KL divergence from it. Bounds hold with 95 % confidence each.
Six minutes.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from components.config import config_file
from components.prepare.rows import example_rows
from components.shared.paired import Array, Pairs, bounds
from ray_jobs import entry
from ray_jobs.adapters import build
from ray_jobs.base import base_model
from ray_jobs.kernels import door
from ray_jobs.probes.texts import passages_split, sample, undrawn
from ray_jobs.scoring.generation import label_nll
from ray_jobs.text import chat_format
from ray_jobs.text.batching import TokenizedSplit
from ray_jobs.training import zero
from tests.models.plain import plain_training

CONFIG = Path(__file__).parents[1] / "pipelines" / "configs" / "icd10.toml"
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting", description=__doc__)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 2e-2])
    parser.add_argument("--steps", type=int, default=24, help=f"optimizer steps of {BATCH} records")
    parser.add_argument("--passages", type=int, help="of general text; evaluate.general_passages otherwise")
    parser.add_argument("--answers", type=int, default=24, help="of the base's own, evaluate.own_answers")
    options = parser.parse_args()
    entry.quiet_libraries()
    zero.prepare_environment(use_gpu=False)
    settings = {"train.max_steps": options.steps, "train.batch_size": BATCH, "ray.num_workers": 1}
    settings |= {"evaluate.own_answers": options.answers}
    settings |= {"evaluate.general_passages": options.passages} if options.passages else {}
    chosen = [f"{key}={value}" for key, value in settings.items()]
    config = config_file.load(CONFIG, chosen)
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    passages = passages_split(chat, config)
    kernels = door.choose(config, base_model.load_config(base.path, config.model))
    model = door.load_model(base, config.model, config.method.row.base, kernels, use_gpu=False)
    kernels.hold_dense_if_room(model)
    asked = undrawn(chat, config)
    started = time.perf_counter()
    drawn = sample(model.eval(), chat, asked.split, BATCH, asked.new_tokens)
    print(f"{len(drawn)} answers of the base's own, drawn in {time.perf_counter() - started:.1f} s")
    kinds = {"general text": passages, "own answers": asked.answered(drawn).split}
    before = {}
    for kind, split in kinds.items():
        before[kind], seconds = read(model, split, chat.pad)
        tokens = int(split.num_answer_tokens.sum())
        print(f"{kind}: {len(split)} of {tokens} tokens; base: loss {before[kind].sum() / tokens:.3f}, {seconds:.1f} s")

    rows = random.Random(0).sample(list(example_rows()), options.steps * BATCH * 8 // 7 + BATCH)
    for rate in options.rates:
        trained = plain_training(
            config_file.dumps(config_file.load(CONFIG, [*chosen, f"train.learning_rate={rate}"])), rows
        )
        with tempfile.TemporaryDirectory(prefix="fineloop-forgetting-") as folder:
            build.save(trained.model, Path(folder))
            adapted = kernels.adopt(build.load(model, Path(folder)))
        for kind, split in kinds.items():
            after, seconds = read(adapted, split, chat.pad)
            rise = bounds(Pairs(after, before[kind], split.num_answer_tokens.astype(float)), 0.95)
            assert rise is not None
            print(
                f"rate {rate:.0e}, {kind}: {rise.gain:+.3f} (between {rise.lower:+.3f} and {rise.upper:+.3f}), "
                f"{seconds:.1f} s",
                flush=True,
            )
        adapted.unload()


def read(model: Any, texts: TokenizedSplit, pad: int) -> tuple[Array, float]:
    """Nats of each text, and how many seconds it took."""
    started = time.perf_counter()
    nll = label_nll(model.eval(), texts, BATCH, pad)
    return np.array(nll), time.perf_counter() - started


if __name__ == "__main__":
    main()
