"""The loss on answers, with logits computed only for labelled tokens, and in chunks.

A vocabulary is far larger than a hidden state, and most tokens of a record are its prompt: the full logits would take
most of the memory and a large part of the time of a small model's step.

Shapes: A labelled tokens of a batch, H the hidden width, V the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from components.config.schema import TrainingConfig
from ray_jobs.base.attention import FLASH, FLOAT32, MOST_TOKENS, RECORDS, looks_at_all_before
from ray_jobs.base.packing import Packing
from ray_jobs.text.batching import IGNORED, TokenizedSplit, collate, common_beginning

CHUNK_LOGITS = 2**26
"""Maximum number of logits in memory at once: 256 MiB in float32, and still matrix products of hundreds of rows."""

AfterHead = Callable[[Tensor], Tensor]
_after_head: "WeakKeyDictionary[torch.nn.Module, AfterHead | None]" = WeakKeyDictionary()
"""For each output head that was used: the function that the model applies to its logits; None where it is unknown."""


def chunk_positions(vocabulary: int) -> int:
    """Number of positions per chunk."""
    return max(1, CHUNK_LOGITS // vocabulary)


def answer_nll(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each labelled token in nats, float32 of shape (A,), row after row.

    `model` may be a transformers model, a peft model or a DeepSpeed engine; its rows are padded on the right.
    """
    nothing = labels.new_full((len(labels), 1), IGNORED)
    return next_token_nll(model, input_ids, torch.cat([labels[:, 1:], nothing], dim=1), use_cache=False)


def next_token_nll(model: Any, input_ids: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Negative log-likelihood of `targets` in nats, float32 of shape (A,): the token that follows each token of
    `input_ids`, or IGNORED. `inputs` are further arguments of the model's forward.

    No mask is needed where rows are padded on the right and there is no KV cache before them: see `batching`.
    """
    module = getattr(model, "module", model)  # a DeepSpeed engine wraps the model
    head: torch.nn.Module = module.get_output_embeddings()
    wanted = targets != IGNORED
    targets = targets[wanted]
    positions = chunk_positions(module.config.get_text_config().vocab_size)
    if len(targets) > positions and _may_be_chunked(head):
        if head not in _after_head and not is_shared(head):  # an additional forward pass would be a collective
            with torch.no_grad():
                _logits(model, module, head, input_ids[:1, :1], wanted.new_ones(1, 1), use_cache=False)
        if (after := _after_head.get(head)) is not None:
            return _in_chunks(model, head, after, input_ids, wanted, targets, positions, **inputs)
    return F.cross_entropy(_logits(model, module, head, input_ids, wanted, **inputs).float(), targets, reduction="none")


def _may_be_chunked(head: torch.nn.Module) -> bool:
    """Whether the loss may be computed in chunks: not with a trained head, nor before a backward pass through a sharded
    one, since DeepSpeed counts backward passes by the head's output, which chunked losses bypass."""
    is_trained = any(parameter.requires_grad for parameter in head.parameters())
    return not is_trained and not (is_shared(head) and torch.is_grad_enabled())


def is_shared(model: torch.nn.Module) -> bool:
    """Whether its weights are sharded over the workers (ZeRO-3): each forward pass is then a collective operation."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _logits(model: Any, module: Any, head: torch.nn.Module, input_ids: Tensor, wanted: Tensor, **inputs: Any) -> Tensor:
    """The logits (A, V) at the positions `wanted`, as the model's own forward computes them."""
    raw: list[Tensor] = []

    def select(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][wanted],)

    def keep(_: torch.nn.Module, __: Any, output: Tensor) -> None:
        raw.append(output[:1].detach())

    with head.register_forward_pre_hook(select), head.register_forward_hook(keep):
        logits: Tensor = model(input_ids=input_ids, **inputs).logits
    if head not in _after_head and len(logits):
        after = _known_after_head(module.config.get_text_config())
        is_known = torch.equal(after(raw[0]).float(), logits[:1].detach().float())
        _after_head[head] = after if is_known else None
    return logits


def _known_after_head(config: Any) -> AfterHead:
    """The function that Granite, Cohere and Gemma apply to logits, according to the config. The caller verifies it."""

    def after(logits: Tensor) -> Tensor:
        if divisor := getattr(config, "logits_scaling", None):
            logits = logits / divisor
        if factor := getattr(config, "logit_scale", None):
            logits = logits * factor
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    return after


def _in_chunks(
    model: Any,
    head: torch.nn.Module,
    after: AfterHead,
    input_ids: Tensor,
    wanted: Tensor,
    targets: Tensor,
    positions: int,
    **inputs: Any,
) -> Tensor:
    """`next_token_nll` in one forward pass, in which the head computes the losses in chunks and returns no logits."""
    losses: list[Tensor] = []
    forward = head.forward

    def loss(hidden: Tensor) -> Tensor:
        rows = hidden[wanted]
        losses.append(_ChunkedNll.apply(rows, targets, lambda chunk: after(forward(chunk)), positions))
        return forward(rows[:1].detach())  # the rest of the model's forward gets one row of logits

    before = head.__dict__.get("forward")
    head.forward = loss  # its hooks still run
    try:
        model(input_ids=input_ids, **inputs)
    finally:
        del head.forward
        if before is not None:
            head.forward = before
    return losses[0]


class _ChunkedNll(torch.autograd.Function):
    """Losses of rows through a frozen head. The forward pass computes their gradients too, chunk by chunk.

    A row's loss depends on that row alone, so the backward pass only scales its gradient by the loss's own gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, logits_of: AfterHead, positions: int) -> Tensor:
        """Compute the losses (A,) of `rows` (A, H) for `targets` (A,)."""
        needs_grad = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for chunk, wanted in zip(rows.split(positions), targets.split(positions), strict=True):
            with torch.set_grad_enabled(needs_grad):
                inputs = chunk.detach().requires_grad_(needs_grad)
                loss = F.cross_entropy(logits_of(inputs).float(), wanted, reduction="none")
                if needs_grad:
                    gradients += torch.autograd.grad(loss.sum(), inputs)
            losses.append(loss.detach())
        if needs_grad:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        """Scale the rows' gradients; `outer[0]` is the gradient of each loss, shape (A,)."""
        (gradients,) = ctx.saved_tensors
        return (gradients.float() * outer[0].unsqueeze(-1)).to(gradients.dtype), None, None, None


# A micro-batch in one row, without padding: [common] [rest of record 1] [rest of record 2] ... [rest of record N]
#
# In a causal model the common prefix (a system message, an instruction) has the same activations in every record; so it
# is computed once, and receives the gradients of all records. Only attention handles records: each token attends to the
# common prefix and to the earlier tokens of its own record.
#
# Shapes: N records, T tokens of the row.

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
    row = pack(split, indices) if packs and can_pack(model, int(split.lengths[indices].max())) else None
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


def can_pack(model: Any, longest: int) -> bool:
    """Whether records of up to `longest` tokens may be packed for this model: its attention must support it."""
    base = getattr(model, "module", model).config
    return base._attn_implementation in (FLOAT32, RECORDS, FLASH) and looks_at_all_before(base, longest)


def may_pack(config: TrainingConfig) -> bool:
    """Whether a training's records may be packed. Dropout would be the same on the common prefix for all records."""
    return not config.method.dropout


def pack(split: TokenizedSplit, indices: Sequence[int] | npt.NDArray[np.int64]) -> Row | None:
    """Pack the records into one row; None where that saves too little."""
    records = [split.tokens[split.offsets[i] : split.offsets[i + 1]].astype(np.int64) for i in indices]
    labelled = [split.labelled[split.offsets[i] : split.offsets[i + 1]] for i in indices]
    # No label may be shared, nor the token whose logits predict the first one.
    first = min(int(flags.argmax()) if flags.any() else len(flags) for flags in labelled)
    common = common_beginning(records, max(0, first - 1))
    lengths = [len(record) for record in records]
    total = common + sum(length - common for length in lengths)
    if total > min(MOST_TOKENS, (1 - WORTH) * len(records) * max(lengths)):
        return None
    targets = [
        np.append(np.where(flags[1:], record[1:], IGNORED), IGNORED)
        for record, flags in zip(records, labelled, strict=True)
    ]
    ignored = np.full(common, IGNORED)
    row = torch.from_numpy(np.concatenate([ignored, *(tokens[common:] for tokens in targets)]))
    return Row(
        input_ids=torch.from_numpy(np.concatenate([records[0][:common], *(tokens[common:] for tokens in records)]))[
            None
        ],
        targets=row[None],
        packing=Packing(
            common, tuple(length - common for length in lengths), read=(row != IGNORED).nonzero().flatten()
        ),
    )
