"""What all sides train: the example's base as safetensors, the same records in the same order, the same recipe.

Records are tokenised once, by Fineloop, and every side is given tokens and labels: of each it is asked to train, not
to read a chat template. Rows stand in the order of the batches, which are grouped by length as every side can group
them by itself (`group_by_length`), so that all sides pad alike and see the same batch at each step.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

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
    threads: int,
    shape: str = "",
    use_gpu: bool = False,
) -> dict[str, Any]:
    """Write rows into a folder and give the task: both orders of rows, and what is to be done with them.

    `record_tokens` joins records to rows of exactly so many tokens, and 0 leaves them as they are; `shape` is one of
    `bases`, and empty means the example's base.
    """
    import numpy as np

    from benchmarks import example
    from benchmarks.peers import bases
    from ray_jobs.text.batching import IGNORED, plan_epoch, tokenize

    config, base, chat, everything, kernels = example.parts(threads, on_gpu=use_gpu)
    split = tokenize(everything[: records * max(1, record_tokens // FEWEST_TOKENS)], chat, config.model.max_length)
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
        learned = zip(tokens[start:end], labelled[start:end], strict=True)
        labels = [token if learn else IGNORED for token, learn in learned]
        rows.append({"input_ids": tokens[start:end], "attention_mask": [1] * (end - start), "labels": labels})
    lengths = [len(row["input_ids"]) for row in rows]
    orders = {}
    for order, group_by_length in (("grouped", True), ("shuffled", False)):
        plan = plan_epoch(np.array(lengths), batch_size=batch_size, group_by_length=group_by_length, seed=0, epoch=0)
        path = folder / f"{order}.jsonl"
        path.write_text("".join(json.dumps(rows[i]) + "\n" for batch in plan for i in batch), encoding="utf-8")
        orders[order] = {
            "rows": str(path),
            "tokens": sum(lengths[i] for batch in plan[WARM_UP_STEPS:] for i in batch),
        }
    return {
        "base": str(bases.write(folder / "base", shape, base.path) if shape else base.path),
        "gpu": use_gpu,
        "dtype": kernels.dtype,
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
