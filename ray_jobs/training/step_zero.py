"""The check before the first step: a sharded model must have the same loss as the unsharded one.

A library that shards weights it does not support trains on wrong ones without an error (bitsandbytes#1451: int8 under
ZeRO-3, loss 13 instead of 1). Rank 0 computes the loss of a few records in a plain forward pass, before DeepSpeed has
changed anything; then every worker computes it through its engine.

So that no process has to hold the whole model, the plain pass under ZeRO-3 reads the base layer by layer and leaves out
the adapter's initial weights. Only a base that is stored quantised is read whole.
"""

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer

from components.config.schema import RunConfig
from components.shared.errors import IntegrityError, JobError, ObjectMissing, StoreError
from components.store.store import JSON, Store, encode_json
from ray_jobs.base.base_model import Base
from ray_jobs.base.streamed import streamed
from ray_jobs.kernels.door import Kernels, load_model
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import TokenizedSplit, by_length, collate
from ray_jobs.training.group import Worker

logger = logging.getLogger(__name__)

KNOWN = "bases/first-checks/"
"""Prefix in the registry of the known losses of unsharded bases."""
RECORDS = 4  # the shortest ones: under ZeRO-3 the plain pass runs on a CPU
# How far other kernels and another summation order may move the loss: in nats, and as a share of the loss.
TOLERANCE = 0.02
RELATIVE_TOLERANCE = 0.005


def probe(split: TokenizedSplit, pad: int) -> dict[str, torch.Tensor]:
    """The records that are compared: `input_ids` and `labels`, both (B, T)."""
    shortest = list(by_length(split.lengths, 1))[-RECORDS:]
    return collate(split, [int(index) for (index,) in shortest], pad)


@torch.no_grad()
def probe_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device, *, with_adapter: bool = True
) -> float:
    """Mean loss in nats per answer token, without dropout. Under ZeRO-3 every worker must call it."""
    was_training = model.training
    model.eval()
    with nullcontext() if with_adapter else _adapter_off(model):
        loss = answer_nll(model, batch["input_ids"].to(device), batch["labels"].to(device)).double().mean().item()
    model.train(was_training)
    return loss


def base_loss(config: RunConfig, base: Base, probe: dict[str, torch.Tensor], kernels: Kernels) -> float:
    """The base's loss, unsharded and on the CPU; only one layer is in memory at a time where possible."""
    cpu, base_format = torch.device("cpu"), config.method.row.base
    try:
        with streamed(base, config.model, base_format, linear=kernels.linear) as model:
            return probe_loss(model, probe, cpu)
    except NotImplementedError as exc:
        # Llama 4 moves its token ids to the device of its embedding, which is the meta device.
        logger.info("the base cannot be read layer by layer, and is read whole for the first check: %s", exc)
    model = load_model(base, config.model, base_format, kernels, use_gpu=False)
    return probe_loss(model, probe, cpu)


def known_base_loss(
    store: Store, config: RunConfig, base: Base, probe: dict[str, torch.Tensor], kernels: Kernels
) -> float:
    """`base_loss`, cached in the store: a restart, or another run on the same records, need not read the base."""
    of = {
        "base": base.identity,
        "format": config.method.row.base,
        "attention": config.model.attention,
        "products": kernels.dtype,
        "probe": {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in probe.items()},
        "packages": [torch.__version__, transformers.__version__],
    }
    key = f"{KNOWN}{hashlib.sha256(encode_json(of)).hexdigest()[:16]}.json"
    with suppress(ObjectMissing, IntegrityError, TypeError, LookupError, ValueError):
        found = store.get_json(key)
        if found["of"] == of:
            return float(found["loss"])
    loss = base_loss(config, base, probe, kernels)
    if math.isfinite(loss):
        with suppress(StoreError):  # otherwise the next start computes it again
            store.claim(key, encode_json({"of": of, "loss": loss}), content_type=JSON)
    return loss


@contextmanager
def _adapter_off(model: torch.nn.Module) -> Iterator[None]:
    """Within, the adapter is disabled.

    peft's own way would also set requires_grad of its weights to False, on whose gradients DeepSpeed has hooks by then.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def require_same_loss(found: float, expected: float, *, worker: Worker, zero_stage: int) -> None:
    """Stop all workers if the loss of one differs from rank 0's plain loss; `expected` is used on rank 0 only.

    Raises:
        JobError: on every worker.
    """
    losses = torch.zeros(worker.num_workers + 1, dtype=torch.float64, device=worker.device)
    losses[worker.rank] = found
    if worker.rank == 0:
        losses[-1] = expected
    dist.all_reduce(losses)
    *sharded, plain = losses.tolist()
    distances = [math.inf if math.isnan(loss) else abs(loss - plain) for loss in sharded]
    rank = distances.index(max(distances))
    limit = TOLERANCE + RELATIVE_TOLERANCE * plain
    logger.info("loss before the first step: %.4f, unsharded %.4f", sharded[rank], plain)
    if math.isfinite(plain) and distances[rank] > limit:  # a NaN in the plain loss is not due to sharding
        raise JobError(
            f"before the first step, rank {rank}'s loss with train.zero_stage={zero_stage} is {sharded[rank]:.4f} and "
            f"that of the same model unsharded is {plain:.4f}, more than {limit:.2f} apart: the weights were not "
            "sharded right, and training would go on wrong ones; use a lower train.zero_stage"
        )
