"""The loss on answers, with logits computed only where there is a label.

A vocabulary is far wider than a hidden state, and most tokens of a record are its prompt: the full logits would be most
of the memory and a large part of the time of a small model's step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from ray_jobs.base.batching import IGNORED


def answer_logits(model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict each labelled token, float32 of shape (A, V), and those tokens, shape (A,), row after row.

    `model` may be a transformers model, a peft model or a DeepSpeed engine; its rows are padded on the right.
    """
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    with _head_sees_only(_head(model), wanted):
        # use_cache=False: no keys and values are kept. No mask: see `batching`.
        logits = model(input_ids=input_ids, use_cache=False).logits
    return logits.float(), targets[wanted]


def answer_nll(model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each labelled token in nats, float32 of shape (A,), row after row."""
    logits, targets = answer_logits(model, input_ids, labels)
    return F.cross_entropy(logits, targets, reduction="none")


def _head(model: Any) -> torch.nn.Module:
    module = getattr(model, "module", model)  # a DeepSpeed engine wraps what it trains
    head: torch.nn.Module = module.get_output_embeddings()
    return head


@contextmanager
def _head_sees_only(head: torch.nn.Module, wanted: torch.Tensor) -> Iterator[None]:
    """Hand the output head the hidden states at `wanted`, shape (B, T - 1), alone.

    The model's own forward still does what follows the head, such as scaling or soft-capping the logits.
    """

    def select(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0][:, :-1][wanted],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
