"""The reference of every distributed training: a plain loop in one process, without DeepSpeed."""

from dataclasses import dataclass, field
from typing import Any

import torch

from components.config import config_file
from components.store.store import Store
from ray_jobs.adapters import build, own_base
from ray_jobs.base import base_model
from ray_jobs.text import chat_format
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import collate, plan_epoch, tokenize
from ray_jobs.training.train_loop import learning_rate_at, num_steps
from tests.doubles.datasets import validate


@dataclass(frozen=True)
class Curve:
    """Loss and gradient norm of each step, before the update."""

    losses: list[float]
    grad_norms: list[float]
    model: Any = field(default=None, compare=False)
    """As it is after the last step, in training mode."""
    masters: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)
    """Float32 master of each trained weight, by its name in the model."""


def plain_training(
    config_toml: str, rows: list[dict[str, str]], *, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> Curve:
    """Whole batches, bfloat16 weights, float32 masters, torch's own AdamW or another `optimizer`."""
    config = config_file.loads(config_toml)
    train = config.train
    original = base_model.resolve(config.model)
    base = own_base.prepare(config, original, Store.open(config.registry))
    chat = chat_format.load(base, config.model)
    records = [validate(row).record for row in rows]
    split = tokenize(records[: len(records) * 7 // 8], chat, config.model.max_length)
    model = base_model.load_model(base, config.model, config.method.row.base, use_gpu=False)
    model = build.attach(model, config.method, base_reference="tiny", seed=train.seed).train()
    own_base.begin(config, model, base)
    build.to_training(model, torch.bfloat16)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    weights = list(trained.values())
    masters = [weight.detach().float().clone() for weight in weights]
    curve = Curve([], [], model, dict(zip(trained, masters, strict=True)))
    # AdamW's decay (arXiv:1711.05101) is of weights; magnitudes have none.
    decayed = [master for name, master in curve.masters.items() if "magnitude" not in name and "lambda_m" not in name]
    kept = [master for name, master in curve.masters.items() if "magnitude" in name or "lambda_m" in name]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    stepper = optimizer([group for group in groups if group["params"]], lr=0.0)
    steps = num_steps(train, len(split))
    plan = plan_epoch(split.lengths, batch_size=train.batch_size, group_by_length=True, seed=0, epoch=0)
    for step, batch in enumerate(plan[:steps]):
        tensors = collate(split, batch, chat.pad)
        loss = answer_nll(model, tensors["input_ids"], tensors["labels"]).mean()
        loss.backward()
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
        curve.losses.append(loss.item())
        curve.grad_norms.append(float(norm))
        rate = learning_rate_at(step, peak=config.learning_rate, num_steps=steps, warmup_share=train.warmup_share)
        for group in stepper.param_groups:
            group["lr"] = rate
        stepper.step()
        for weight, master in zip(weights, masters, strict=True):
            weight.data.copy_(master)
    return curve
