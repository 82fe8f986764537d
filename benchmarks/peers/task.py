"""What all sides train: the example's base as safetensors, the same records in the same order, the same recipe.

Records are tokenised once, by Fineloop, and every side is given tokens and labels: of each it is asked to train, not
to read a chat template. Rows stand in the order of the batches, which are grouped by length as every side can group
them by itself (`group_by_length`), so that all sides pad alike and see the same batch at each step.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.peak import peak_mb

CONFIG = Path(__file__).parents[2] / "pipelines" / "configs" / "icd10.toml"
WARM_UP_STEPS = 2
LAST_STEPS = 8
"""The loss that is compared is the mean of so many last steps, or of the second half where that is less."""
FEWEST_TOKENS = 16
"""No record of the example has fewer, its chat template's included."""


def write(
    folder: Path,
    *,
    records: int,
    batch_size: int,
    record_tokens: int,
    labels: str,
    base_format: str,
    matmul_dtype: str,
    threads: int,
    shape: str = "",
    use_gpu: bool = False,
) -> dict[str, Any]:
    """Write rows into a folder and give the task: both orders of rows, and what is to be done with them.

    `record_tokens` joins records to rows of exactly so many tokens, and 0 leaves them as they are; `labels` is
    `answers` or `all`; `matmul_dtype` is as ray.cpu_matmul_dtype; `shape` is one of `bases`, and empty means the
    example's base.
    """
    import numpy as np
    import torch

    from benchmarks.peers import bases
    from components.config import config_file
    from components.prepare.icd10 import rows as example_rows
    from ray_jobs import entry
    from ray_jobs.base import base_model
    from ray_jobs.kernels import door
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import IGNORED, plan_epoch, tokenize
    from tests.doubles.datasets import validate

    entry.quiet_libraries()
    torch.set_num_threads(threads)
    config = config_file.load(CONFIG, [f"ray.cpu_matmul_dtype={matmul_dtype}"])
    base = base_model.resolve(config.model)
    keyed = sorted((validate(row) for row in example_rows()), key=lambda each: each.key)
    enough = keyed[: records * max(1, record_tokens // FEWEST_TOKENS)]
    split = tokenize([each.record for each in enough], chat_format.load(base, config.model), config.model.max_length)
    tokens, labelled = split.tokens.tolist(), split.labelled.tolist()
    bounds = split.offsets.tolist()
    if record_tokens:
        bounds = list(range(0, len(tokens) + 1, record_tokens))
    num_steps = records // batch_size
    pieces = list(pairwise(bounds))[: num_steps * batch_size]
    if len(pieces) < num_steps * batch_size or num_steps <= WARM_UP_STEPS:
        raise SystemExit(
            f"{records} records in batches of {batch_size}: more than two steps, of {len(bounds) - 1} records"
        )
    rows = []
    for start, end in pieces:
        learned = [labels == "all" or each for each in labelled[start:end]]
        rows.append({
            "input_ids": tokens[start:end],
            "attention_mask": [1] * (end - start),
            "labels": [token if learn else IGNORED for token, learn in zip(tokens[start:end], learned, strict=True)],
        })  # fmt: skip
    lengths = [len(row["input_ids"]) for row in rows]
    orders = {}
    for order, group_by_length in (("grouped", True), ("shuffled", False)):
        plan = plan_epoch(
            np.array(lengths),
            batch_size=batch_size,
            group_by_length=group_by_length,
            seed=0,
            epoch=0,
        )
        path = folder / f"{order}.jsonl"
        path.write_text("".join(json.dumps(rows[i]) + "\n" for batch in plan for i in batch), encoding="utf-8")
        orders[order] = {
            "rows": str(path),
            **counts([[rows[i]["labels"] for i in batch] for batch in plan[WARM_UP_STEPS:]], IGNORED),
        }
    return {
        "base": str(bases.write(folder / "base", shape, base.path) if shape else base.path),
        "format": base_format,
        "gpu": use_gpu,
        "dtype": door.choose(config, base_model.load_config(base.path, config.model), on_gpu=use_gpu).dtype,
        "orders": orders,
        "batch_size": batch_size,
        "max_length": max(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "steps": num_steps,
        "warm_up": WARM_UP_STEPS,
        "last": min(LAST_STEPS, num_steps // 2),
        "rank": config.method.r,
        "alpha": config.method.lora_alpha,
        "learning_rate": config.learning_rate,
        "threads": threads,
    }


def counts(batches: list[list[list[int]]], ignored: int) -> dict[str, int]:
    """Counts over batches of label lists: tokens, tokens with padding, labelled tokens, squared lengths."""
    rows = [labels for batch in batches for labels in batch]
    return {
        "tokens": sum(len(labels) for labels in rows),
        "padded": sum(len(batch) * max(len(labels) for labels in batch) for batch in batches),
        "labelled": sum(label != ignored for labels in rows for label in labels),
        "squares": sum(len(labels) ** 2 for labels in rows),
    }


def figures(given: dict[str, Any], ended: list[float], losses: list[float]) -> dict[str, float]:
    """The figures that sides/measured.py prints, for a side whose steps ended at these times."""
    return {
        "seconds": ended[-1] - ended[given["warm_up"] - 1],
        "steps": len(ended),
        "peak_mb": peak_mb(gpu=given["gpu"]),
        "first_loss": losses[0],
        "loss": sum(losses[-given["last"] :]) / given["last"],
    }
