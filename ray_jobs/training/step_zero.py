"""The check before the first step: a sharded model must have the same loss as the unsharded one.

A library that shards weights it does not support trains on wrong ones without an error (bitsandbytes#1451: int8 under
ZeRO-3, loss 13 instead of 1). Rank 0 computes the loss of a few records before DeepSpeed has changed anything, then
every worker through its engine. Under ZeRO-3 no process has to hold the whole model: the base is read layer by layer,
without the adapter's initial weights, unless it is stored quantised.
"""

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer

from components.shared.errors import IntegrityError, JobError, ObjectMissing, StoreError
from components.store.store import JSON, Store, encode_json
from ray_jobs.base.base_model import Base
from ray_jobs.base.streamed import streamed
from ray_jobs.kernels.door import Kernels, load_model
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import TokenizedSplit, collate
from ray_jobs.training.spec import TrainingConfig
from ray_jobs.training.zero import Worker

logger = logging.getLogger(__name__)

KNOWN = "bases/first-checks/"
"""Prefix in the registry of the known losses of unsharded bases."""
# The shortest records, as under ZeRO-3 the plain pass runs on a CPU: enough for ANSWER_TOKENS, but no more TOKENS in
# all, and at least RECORDS.
RECORDS = 4
TOKENS = 512
ANSWER_TOKENS = 200
TOLERANCE, RELATIVE_TOLERANCE = 0.2, 0.02
"""In nats, and as a share of the mean loss."""


@dataclass(frozen=True)
class FirstCheck:
    """What the sharded model is held to."""

    batch: dict[str, torch.Tensor]
    """The records that are compared: `input_ids` and `labels`, both (B, T)."""
    plain_nll: torch.Tensor | None
    """Under ZeRO-3, on rank 0: the losses of the unsharded model. Below it the training's own model gives them."""
    with_adapter: bool
    """Whether the adapter takes part: a base that is read layer by layer has none."""


def probe(split: TokenizedSplit, pad: int) -> dict[str, torch.Tensor]:
    """The records that are compared: `input_ids` and `labels`, both (B, T)."""
    shortest = np.argsort(split.lengths, kind="stable")
    answers, tokens = (np.cumsum(counts[shortest]) for counts in (split.num_answer_tokens, split.lengths))
    enough, most = np.searchsorted(answers, ANSWER_TOKENS) + 1, np.searchsorted(tokens, TOKENS, side="right")
    return collate(split, shortest[: max(RECORDS, min(enough, most))].tolist(), pad)


@torch.no_grad()
def probe_nll(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device, *, with_adapter: bool = True
) -> torch.Tensor:
    """The loss of each answer token in nats, float64 (A,), without dropout. Under ZeRO-3 every worker must call it."""
    was_training = model.training
    model.eval()
    with nullcontext() if with_adapter else _adapter_off(model):
        nll = answer_nll(model, batch["input_ids"].to(device), batch["labels"].to(device)).double()
    model.train(was_training)
    return nll


def known_base_nll(
    store: Store,
    config: TrainingConfig,
    base: Base,
    probe: dict[str, torch.Tensor],
    kernels: Kernels,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`base_nll`, cached in the store: a restart, or another run on the same records, need not read the base."""
    of = {
        "base": base.identity,
        "format": config.method.row.base,
        "attention": [config.model.attention, config.ray.use_gpu],
        "dtype": str(dtype),
        "products": kernels.dtype,
        "probe": {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in probe.items()},
        "packages": [torch.__version__, transformers.__version__],
    }
    key = f"{KNOWN}{hashlib.sha256(encode_json(of)).hexdigest()[:16]}.json"
    with suppress(ObjectMissing, IntegrityError, TypeError, LookupError, ValueError):
        entry = store.get_json(key)
        if entry["of"] == of:
            return torch.tensor(entry["losses"], dtype=torch.float64)
    losses = base_nll(config, base, probe, kernels, dtype)
    if losses.isfinite().all():
        with suppress(StoreError):  # otherwise the next start computes it again
            store.claim(key, encode_json({"of": of, "losses": losses.tolist()}), content_type=JSON)
    return losses


def base_nll(
    config: TrainingConfig, base: Base, probe: dict[str, torch.Tensor], kernels: Kernels, dtype: torch.dtype
) -> torch.Tensor:
    """`probe_nll` of the base in the training's dtype and attention, unsharded and on the CPU; only one layer is in
    memory at a time where possible."""
    cpu, base_format = torch.device("cpu"), config.method.row.base
    here = {"linear": kernels.linear, "like_gpu": config.ray.use_gpu, "dtype": dtype}
    try:
        with streamed(base, config.model, base_format, **here) as model:
            return probe_nll(model, probe, cpu)
    except NotImplementedError as exc:
        # Llama 4 moves its token ids to the device of its embedding, which is the meta device.
        logger.info("the base cannot be read layer by layer, and is read whole for the first check: %s", exc)
    model = load_model(base, config.model, base_format, kernels, use_gpu=False, dtype=dtype)
    return probe_nll(model, probe, cpu)


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


def require_same(losses: torch.Tensor, expected: torch.Tensor | None, *, worker: Worker, zero_stage: int) -> None:
    """Stop all workers if the tokens' losses of one differ from rank 0's plain ones; rank 0 alone has `expected`.

    Tokens are compared one by one: in the mean loss their differences cancel, and a wrong matrix may move it no further
    than rounding does. Raises JobError: on every worker.
    """
    table = torch.zeros(worker.num_workers + 1, len(losses), dtype=torch.float64, device=worker.device)
    table[worker.rank] = losses
    if expected is not None:
        table[-1] = expected
    dist.all_reduce(table)
    *sharded, plain = table.mean(dim=1).tolist()
    distances = (table[:-1] - table[-1]).abs().mean(dim=1).nan_to_num(math.inf).tolist()
    rank = distances.index(max(distances))
    # How far other kernels, which round otherwise and sum in another order, may move a token's loss on average.
    most = TOLERANCE + RELATIVE_TOLERANCE * plain
    logger.info("loss before the first step: %.4f, unsharded %.4f", sharded[rank], plain)
    if math.isfinite(plain) and distances[rank] > most:  # a NaN in the plain loss is not due to sharding
        raise JobError(
            f"before the first step, rank {rank}'s loss with train.zero_stage={zero_stage} is {sharded[rank]:.4f} and "
            f"that of the same model unsharded is {plain:.4f}. Of {len(losses)} answer tokens the losses are "
            f"{distances[rank]:.3f} apart on average, and rounding explains up to {most:.3f}: training would go on "
            "other weights than the base's. Use a lower train.zero_stage"
        )
