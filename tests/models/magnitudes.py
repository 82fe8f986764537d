"""What a training makes of DoRA's magnitudes, seen in its forward passes, against arXiv:2402.09353, equation 5.

The equation is written out in numpy's float64, on the float32 masters that the optimizer holds and on the frozen
weights as torch and bitsandbytes read them: nothing of ours is in between.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit

from components.config import config_file
from ray_jobs.adapters import build, dora
from ray_jobs.base import base_model
from ray_jobs.text import chat_format
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import by_length, collate, tokenize
from tests.doubles.datasets import validate
from tests.models.plain import plain_training

BATCH = 32
LORA, VERA = ".lora_magnitude_vector.default.weight", ".vera_lambda_m.default"


@dataclass(frozen=True)
class Figures:
    """Figures of m / norm - 1 over all outputs of all adapted layers, and of the held-out loss."""

    true_rms: float
    """By the equation."""
    correlation: float
    """Correlation of the factor in the forward pass with the equation's."""
    share_lost: float
    """Outputs whose forward pass multiplies by exactly one."""
    loss_as_trained: float
    """Nats per answer token."""
    loss_as_loaded: float
    """The same of the published files, as evaluation loads them."""


def measured(config_toml: str, rows: list[dict[str, str]], held_out: list[dict[str, str]]) -> Figures:
    """Train in one process, on seven eighths of the rows, and measure."""
    config = config_file.loads(config_toml)
    curve = plain_training(config_toml, rows)
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    split = tokenize([validate(row).record for row in held_out], chat, config.model.max_length)
    batches = [collate(split, rows, chat.pad) for rows in by_length(split.lengths, BATCH)]

    @torch.no_grad()
    def loss(model: Any) -> float:
        nll = torch.cat([answer_nll(model, batch["input_ids"], batch["labels"]).double() for batch in batches])
        return float(nll.mean())

    as_trained = loss(curve.model)
    with seen_ratios() as ratios, torch.no_grad():
        curve.model(input_ids=batches[0]["input_ids"][:1])
    found = np.concatenate([ratio.double().numpy() for ratio in ratios]) - 1
    true = np.concatenate(
        list(true_ratios(curve.model, curve.masters, scaling=config.method.lora_alpha / config.method.r))
    )
    dora.settle(curve.model)
    with tempfile.TemporaryDirectory(prefix="fineloop-magnitudes-") as scratch:
        build.save(curve.model, Path(scratch))
        fresh = base_model.load_model(base, config.model, config.method.row.base, use_gpu=False)
        as_loaded = loss(build.load(fresh, Path(scratch)).eval())
    return Figures(
        true_rms=float(np.sqrt(np.mean((true - 1) ** 2))),
        correlation=float(np.corrcoef(found, true - 1)[0, 1]),
        share_lost=float(np.mean(found == 0)),
        loss_as_trained=as_trained,
        loss_as_loaded=as_loaded,
    )


@contextmanager
def seen_ratios() -> Iterator[list[torch.Tensor]]:
    """Collects what each adapted layer's forward pass multiplies by, in the order in which they run."""
    ratios: list[torch.Tensor] = []
    ratio = dora.ratio

    def seen(*arguments: torch.Tensor) -> torch.Tensor:
        ratios.append(ratio(*arguments))
        return ratios[-1]

    with mock.patch.object(dora, "ratio", seen):
        yield ratios


def true_ratios(model: torch.nn.Module, masters: dict[str, torch.Tensor], *, scaling: float) -> Iterator[np.ndarray]:
    """m / norm of each adapted layer in the order of the model, which is that in which a Llama runs them."""

    def exact(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().double().numpy()

    for name, change in masters.items():
        kind = next((kind for kind in (LORA, VERA) if name.endswith(kind)), None)
        if kind is None:
            continue
        place = name.removesuffix(kind)
        stored = model.get_submodule(place).base_layer.weight
        state = getattr(stored, "quant_state", None)
        weight = exact(dequantize_4bit(stored.data, state) if state else stored)
        if kind == LORA:
            A, B = (exact(masters[f"{place}.lora_{factor}.default.weight"]) for factor in "AB")
            update = scaling * B @ A
        else:
            b, d = (exact(masters[f"{place}.vera_lambda_{vector}.default"]) for vector in "bd")
            layer = model.get_submodule(place)
            A, B = (exact(getattr(layer, f"vera_{matrix}")["default"]) for matrix in "AB")
            update = np.diag(b) @ B[: len(weight)] @ np.diag(d) @ A[:, : weight.shape[1]]
        yield (np.linalg.norm(weight, axis=1) + exact(change)) / np.linalg.norm(weight + update, axis=1)
