"""Merging an adapter into dense weights, and measuring whether two models give the same predictions.

A 4-bit or int8 base cannot take an update without being rounded again, and peft's merge into one is wrong on CPU. So
the update is added to the weights that the adapter was trained on, dequantised: W' = dequantise(Q), in float32.

Shapes: T tokens of a row, V entries of the vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.shared.errors import FineloopError
from ray_jobs.base.architecture import from_config

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

MIN_ARGMAX_AGREEMENT = 0.999
MAX_MEAN_KL_NATS = 1e-6
"""Largest mean KL divergence that the summation order in float32 may cause; on SmolLM2-135M it is below 1e-9."""
POSITIONS_AT_ONCE = 512
"""Number of positions, padding included, that models compared with each other compute together."""
MOST_ROUNDED_AWAY = 0.1
"""Ratio of two mean KL divergences, of rounding and of the adapter on its base, above which users are warned."""


@dataclass(frozen=True)
class Agreement:
    """How alike two models' next-token distributions are, over every position of some rows."""

    positions: int
    argmax_agreement: float
    """Share of positions at which both models rank the same token first."""
    max_abs_logit_difference: float
    mean_kl_nats: float
    """Mean of KL(reference || other)."""

    @property
    def is_same(self) -> bool:
        """Whether the two models agree up to float32's rounding."""
        return self.argmax_agreement >= MIN_ARGMAX_AGREEMENT and self.mean_kl_nats <= MAX_MEAN_KL_NATS

    def summary(self) -> str:
        """The figures as one line of text."""
        return (
            f"{self.argmax_agreement:.2%} of {self.positions} positions agree, largest logit difference "
            f"{self.max_abs_logit_difference:.2g}, mean KL {self.mean_kl_nats:.2g} nats"
        )


def logits(model: Any, rows: Sequence["torch.Tensor"]) -> Iterator["torch.Tensor"]:
    """The logits (T, V) of each row of token ids (T,), on the CPU, in the dtype that the model gives them.

    Rows that follow each other run together, padded on the right, where a causal model sees nothing of it.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    done = 0
    while done < len(rows):
        batch = [rows[done]]
        while done + len(batch) < len(rows):
            longer = [*batch, rows[done + len(batch)]]
            if len(longer) * max(map(len, longer)) > POSITIONS_AT_ONCE:
                break
            batch = longer
        mask = pad_sequence([torch.ones_like(row) for row in batch], batch_first=True).to(model.device)
        ids = pad_sequence(batch, batch_first=True).to(model.device)
        with torch.inference_mode():
            found = model(input_ids=ids, attention_mask=None if mask.all() else mask, use_cache=False).logits
        yield from (each[: len(row)].cpu() for each, row in zip(found, batch, strict=True))
        done += len(batch)


def agreement(reference: Iterable["torch.Tensor"], other: Iterable["torch.Tensor"]) -> Agreement:
    """Compare logits (T, V), row by row, in float64."""
    positions, agreeing, largest, divergence = 0, 0, 0.0, 0.0
    for expected, found in zip(reference, other, strict=True):
        expected, found = expected.double(), found.double()
        positions += len(expected)
        agreeing += int((expected.argmax(-1) == found.argmax(-1)).sum())
        largest = max(largest, float((expected - found).abs().max()))
        log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
    return Agreement(positions, agreeing / positions, largest, divergence / positions)


def require_same(found: Agreement, what: str) -> None:
    """Require that a model predicts the same as the adapter on its base.

    Raises:
        FineloopError: they differ by more than float32's rounding.
    """
    if not found.is_same:
        raise FineloopError(
            f"nothing is exported, for {what} does not say what the adapter on its base says: {found.summary()}; at "
            f"least {MIN_ARGMAX_AGREEMENT:.1%} must agree, with a mean KL of at most {MAX_MEAN_KL_NATS:g} nats"
        )


def rounding_warnings(dtype: str, rounded: Agreement, effect: Agreement) -> list[str]:
    """Warnings where rounding the weights undoes much of the adapter's `effect` on the base; empty otherwise."""
    lost, moved = rounded.mean_kl_nats, effect.mean_kl_nats
    if lost <= MOST_ROUNDED_AWAY * moved:
        return []
    finer = "float16 or float32" if dtype == "bfloat16" else "float32"
    return [
        f"rounding the weights to {dtype} moves the model by {lost:.2g} nats, and the adapter moves its base by "
        f"{moved:.2g}: save it with --dtype {finer}, or serve the adapter beside its base"
    ]


def dequantise_into(dense: "PreTrainedModel", quantised: "PreTrainedModel") -> None:
    """Copy the quantised model's dequantised weights, exactly, into a dense model of the same architecture."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    with torch.no_grad():
        for name, layer in quantised.named_modules():
            if isinstance(layer, Linear4bit | Linear8bitLt):
                same, weight = dense.get_submodule(name), dequantize_module_weight(layer)
                same.weight.copy_(weight.T if isinstance(same, Conv1D) else weight)  # quantised, it lies as others do


def unquantised(quantised: "PreTrainedModel") -> "PreTrainedModel":
    """A dense float32 model with the dequantised weights of a base that only exists quantised."""
    import copy

    import torch

    shape = copy.deepcopy(quantised.config)
    del shape.quantization_config
    attention = quantised.config._attn_implementation
    dense: PreTrainedModel = from_config(shape, dtype=torch.float32, attn_implementation=attention)
    shapes = {name: weight.shape for name, weight in dense.state_dict().items()}
    kept = {name: weight for name, weight in quantised.state_dict().items() if shapes.get(name) == weight.shape}
    dense.load_state_dict(kept, strict=False)
    dequantise_into(dense, quantised)
    return dense.requires_grad_(False).eval()


def merge(adapted: "PeftModel") -> "PreTrainedModel":
    """Merge the adapter's update into the weights of its dense base, layer by layer and in place; returns the base.

    Raises:
        FineloopError: a merged weight is not finite.
    """
    try:
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except ValueError as exc:
        raise FineloopError(f"the adapter cannot be merged: {exc}") from exc
    return merged


def vocabulary_rows(vocab_size: int, *, count: int, length: int) -> Sequence["torch.Tensor"]:
    """Rows of random token ids, the same on every call: inputs to compare models on when the data is gone."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(vocab_size, (count, length), generator=generator))
