"""A base's copy in NF4, kept in the store (`model.keep_nf4`): quantised once, and a quarter of the bytes to download.

It changes where the weights of method.base nf4 are read from, and nothing else. Reference and identity stay the
original's, and it loads as the same model as the original, bit for bit; that is checked before it is published. It is
stored as `made_base` describes, once for each base and 16-bit dtype. Under ZeRO-3 training reads the original, whose
weights are sharded while they are read; each worker would read a quantised base whole.
"""

import gc
import hashlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from components.config.schema import RunConfig
from components.shared.errors import ConfigError
from components.shared.protocol import say
from components.store.store import Store
from ray_jobs.base import base_config, base_model, made_base, stored_format
from ray_jobs.base.base_model import Base, StoredCopy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FORMAT = 1  # version of the quantisation and of the folder's layout: part of the copy's id
KIND = "nf4"
SHARD = "5GB"  # several files are downloaded at a time


def prepare(
    config: RunConfig,
    store: Store,
    *,
    recorded: Mapping[str, str] | None = None,
    dtype: torch.dtype,
    rank: int = 0,
    num_workers: int = 1,
) -> Base:
    """The base to train on, as `resolve` returns it; several workers need an initialised process group.

    Where a copy is wanted and the store has none, rank 0 reads the original and makes it while the others wait. Every
    worker must call this, before anything, such as ZeRO-3, changes how models are loaded.

    Raises:
        ConfigError: the copy would not be the model that the original gives.
    """
    if not config.keeps_nf4 or config.train.zero_stage == 3:
        return base_model.resolve(config.model, recorded=recorded, registry=store)
    with made_base.gloo_group(num_workers) as group:
        made_base.on_rank_0(lambda: _make_if_missing(config, store, recorded, dtype), rank=rank, group=group)
    return resolve(config, store, recorded=recorded, dtype=dtype)


def resolve(config: RunConfig, store: Store, *, recorded: Mapping[str, str] | None = None, dtype: torch.dtype) -> Base:
    """The base as `base_model.resolve` returns it, or with the files of its copy where `config` wants it and `store`
    has it: then no weights of the original are downloaded. `dtype` is that of the weights which are not quantised.

    Raises:
        IntegrityError: as `base_model.resolve`, or the copy is damaged.
    """
    if config.keeps_nf4:
        base = base_model.resolve(config.model, recorded=recorded, weights=False, registry=store)
        if base.is_known and (made := made_base.find(store, _key(base, dtype))):
            path = made_base.pull(store, made, KIND)
            return replace(base, path=path, copy=StoredCopy(store.uri(made.key), made.manifest_sha256))
    return base_model.resolve(config.model, recorded=recorded, registry=store)


def recipe(base: Base) -> dict[str, str]:
    """What the lineage records of the copy that was read; empty where the original was."""
    return {"nf4_copy": base.copy.uri, "nf4_copy_sha256": base.copy.manifest_sha256} if base.copy else {}


def _key(base: Base, dtype: torch.dtype) -> str:
    return made_base.key_of(_made_from(base, dtype))


def _made_from(base: Base, dtype: torch.dtype) -> dict[str, Any]:
    return {"format": FORMAT, "kind": KIND, "original": base.identity, "dtype": str(dtype).removeprefix("torch.")}


def _make_if_missing(config: RunConfig, store: Store, recorded: Mapping[str, str] | None, dtype: torch.dtype) -> None:
    base = base_model.resolve(config.model, recorded=recorded, weights=False, registry=store)
    if stored_format.stored_as(base_config.load(base.path, config.model)):
        return  # its own files are in NF4
    if base.is_known and made_base.find(store, _key(base, dtype)):
        return
    original = base_model.resolve(config.model, recorded=recorded, registry=store)
    if made_base.find(store, _key(original, dtype)) is None:  # an S3 folder is known only once it is read
        _make(config, store, original, dtype)


def _make(config: RunConfig, store: Store, original: Base, dtype: torch.dtype) -> None:
    """Quantise the original as a training would, and publish the result.

    Raises:
        ConfigError: loaded again, it has other weights.
    """
    say("finetune", f"keeping {original.reference} in NF4 in the store, once (model.keep_nf4)")
    with tempfile.TemporaryDirectory(prefix="fineloop-nf4-") as scratch:
        folder = Path(scratch)
        model = _load(original, config, dtype)
        wanted = _digests(model)
        model.save_pretrained(folder, max_shard_size=SHARD)
        del model
        gc.collect()  # a 4-bit weight and its layer reference each other, and two models may be too much
        found = _digests(_load(replace(original, path=folder), config, dtype))
        gc.collect()
        if differing := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
            raise ConfigError(
                f"model.keep_nf4: {original.reference} in NF4 is another model once it is saved and loaded again "
                f"({len(differing)} tensors, such as {differing[0]}): set model.keep_nf4=false"
            )
        about = {"original_reference": original.reference, **_made_from(original, dtype)}
        made_base.publish(store, _key(original, dtype), folder, original, about)


def _load(base: Base, config: RunConfig, dtype: torch.dtype) -> "PreTrainedModel":
    return base_model.load_model(base, config.model, "nf4", use_gpu=config.ray.use_gpu, dtype=dtype)


def _digests(model: "PreTrainedModel") -> dict[str, tuple[str, str]]:
    """Dtype and sha256 of each tensor, scales of the 4-bit weights included."""

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()

    return {name: (str(tensor.dtype), digest(tensor)) for name, tensor in model.state_dict().items()}
