"""A micro-batch in one row: the common prefix of its records once, then the rest of each, with no padding in between.

    [common] [rest of record 1] [rest of record 2] ... [rest of record N]

In a causal model the common prefix (a system message, an instruction) has the same activations in every record; so it
is computed once, and receives the gradients of all records. Layers that process tokens separately handle fewer tokens.
Only attention handles records: each token attends to the common prefix and to the earlier tokens of its own record.

Shapes: N records, T tokens of the row, C of the common prefix, S of the longest rest, X heads of D.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.config.schema import RunConfig
from ray_jobs.base.attention import FLOAT32, MOST_TOKENS, RECORDS, looks_at_all_before
from ray_jobs.base.packing import Packing
from ray_jobs.text.answer_loss import answer_nll, next_token_nll
from ray_jobs.text.batching import IGNORED, TokenizedSplit, collate, common_beginning

CPU = torch.device("cpu")
WORTH = 0.1
"""Share of the padded tokens that packing must save: below that, splitting the row in every layer costs more."""


@dataclass(frozen=True)
class Row:
    """A packed micro-batch, as input of a model."""

    input_ids: Tensor
    """Token ids, int64 (1, T)."""
    targets: Tensor
    """The token that follows each token in its record, or IGNORED: int64 (1, T)."""
    packing: Packing


def records_nll(
    model: Any,
    split: TokenizedSplit,
    indices: Sequence[int] | npt.NDArray[np.int64],
    pad: int,
    *,
    device: torch.device,
    packs: bool = True,
) -> Tensor:
    """-log p in nats of each labelled token of the records at `indices`, float32 of shape (A,), record after record.

    `model` may be a transformers model, a peft model or a DeepSpeed engine; records are packed where possible.
    """
    row = pack(split, indices) if packs and takes(model, int(split.lengths[indices].max())) else None
    if row is None:
        batch = collate(split, indices, pad)
        return answer_nll(model, batch["input_ids"].to(device), batch["labels"].to(device))
    packing = row.packing.on(device)
    return next_token_nll(
        model,
        row.input_ids.to(device),
        row.targets.to(device),
        position_ids=packing.positions,
        attention_mask=packing.mask(),
        packing=packing,
        use_cache=False,
    )


def takes(model: Any, longest: int) -> bool:
    """Whether records of up to `longest` tokens may be packed for this model: its attention must support it."""
    base = getattr(model, "module", model).config
    return base._attn_implementation in (FLOAT32, RECORDS) and looks_at_all_before(base, longest)


def wanted(config: RunConfig) -> bool:
    """Whether a training's records may be packed. Dropout would be the same on the common prefix for all records."""
    return config.train.packing and not config.method.dropout


def pack(split: TokenizedSplit, indices: Sequence[int] | npt.NDArray[np.int64]) -> Row | None:
    """Pack the records into one row; None where that saves too little."""
    records = [split.tokens[split.offsets[i] : split.offsets[i + 1]].astype(np.int64) for i in indices]
    labelled = [split.labelled[split.offsets[i] : split.offsets[i + 1]] for i in indices]
    common = common_beginning(records, min(map(_before_labels, labelled)))
    lengths = [len(record) for record in records]
    total = common + sum(length - common for length in lengths)
    if total > min(MOST_TOKENS, (1 - WORTH) * len(records) * max(lengths)):
        return None
    targets = [
        np.append(np.where(flags[1:], record[1:], IGNORED), IGNORED)
        for record, flags in zip(records, labelled, strict=True)
    ]
    ignored = np.full(common, IGNORED)
    row = torch.from_numpy(np.concatenate([ignored, *(each[common:] for each in targets)]))
    return Row(
        input_ids=torch.from_numpy(np.concatenate([records[0][:common], *(each[common:] for each in records)]))[None],
        targets=row[None],
        packing=Packing(
            common, tuple(length - common for length in lengths), read=(row != IGNORED).nonzero().flatten()
        ),
    )


def _before_labels(flags: npt.NDArray[np.bool_]) -> int:
    """Tokens that other records may share: none that is labelled, nor the one whose logits predict the first label."""
    first = int(flags.argmax()) if flags.any() else len(flags)
    return max(0, first - 1)
