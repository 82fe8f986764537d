"""Fineloop's loop on a task that the peers are given too; runs in our own environment."""

import time
from typing import Any

import numpy as np
import torch

from benchmarks import our_loop
from benchmarks.peers.sides import measured
from components.config import config_file
from components.config.schema import RunConfig
from pipelines.configs import DEFAULT_CONFIG
from ray_jobs import entry
from ray_jobs.base import base_model
from ray_jobs.kernels.door import Kernels
from ray_jobs.text import chat_format
from ray_jobs.text.batching import IGNORED, TokenizedSplit


def main() -> None:
    given = measured.task()
    entry.quiet_libraries()
    torch.set_num_threads(given["threads"])
    config = config_of(given)
    base = base_model.resolve(config.model)
    split = split_of(measured.rows(given))
    plan = np.arange(len(split)).reshape(-1, given["batch_size"])
    engine = our_loop.make(config, base, Kernels(given["dtype"]), dense_base=not given["gpu"])
    ended, losses = [], []
    for loss, _ in our_loop.steps(engine, config, split, chat_format.load(base, config.model).pad, list(plan)):
        ended.append(time.perf_counter())
        losses.append(loss)
    measured.show(given, ended, losses)


def config_of(given: dict[str, Any]) -> RunConfig:
    """The task as a config: one worker, a batch in one forward pass."""
    values = [
        f"model.base={given['base']}",
        "method.name=qlora",
        f"train.batch_size={given['batch_size']}",
        f"train.micro_batch_size={given['batch_size']}",
        "train.warmup_share=0",
        "ray.num_workers=1",
        f"ray.cpus_per_worker={given['threads']}",
        f"ray.use_gpu={str(given['gpu']).lower()}",
    ]
    return config_file.load(DEFAULT_CONFIG, values)


def split_of(rows: list[dict[str, list[int]]]) -> TokenizedSplit:
    labels = [np.array(row["labels"]) != IGNORED for row in rows]
    return TokenizedSplit(
        ids=[str(index) for index in range(len(rows))],
        tokens=np.concatenate([np.array(row["input_ids"], dtype=np.int32) for row in rows]),
        labelled=np.concatenate(labels),
        offsets=np.cumsum([0, *(len(row["input_ids"]) for row in rows)]),
        num_prompt_tokens=np.array([int(labelled.argmax()) for labelled in labels], dtype=np.int32),
        too_long=[],
        cut=[],
    )


if __name__ == "__main__":
    main()
