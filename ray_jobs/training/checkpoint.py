"""Resumable checkpoints in the store: the adapter and the optimizer, never the base.

    runs/<run_id>/checkpoints/step-000100/rank-0/     this worker's shard of the optimizer state: float32 master weights
                                                      and moments, and the pieces of the parameters they belong to
                                          rank-1/
                                          shared/     adapter weights, state.json
                              best-000040/            best weights so far, from the step that state.json names; without
                                                      this folder they are the initial weights

Each of these is a folder with a manifest. `shared` is written after all others, so a checkpoint exists when `shared`
does: a partial upload is never resumed from. Release 0.1.0 has the best weights in `shared`.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from components.config.ray import MatmulDtype
from components.records import runs
from components.shared.errors import IntegrityError, ObjectMissing
from components.store import folders
from components.store.store import Store
from ray_jobs.base.gathered import gathered
from ray_jobs.training import optimizer, zero

STATE, ADAPTER, BEST, OPTIMIZER = "state.json", "adapter.safetensors", "best.safetensors", "optimizer.safetensors"
PIECES = "pieces"
"""Metadata key of the list of pieces in an optimizer file; files of release 0.1.0 lack it."""


@dataclass
class TrainingProgress:
    """The state of a training without its tensors."""

    config_digest: str
    """The config's `training_digest`; in checkpoints of release 0.1.0, its `digest`."""
    num_workers: int
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    best_step: int = 0
    best_loss: float = float("inf")
    evals_without_gain: int = 0
    matmul_dtype: MatmulDtype = "bfloat16"
    """The dtype of the matrix products; older checkpoints lack it, and were trained in bfloat16."""
    loss_scale: float | None = None
    """The loss scale of a training in float16; None in bfloat16."""
    magnitudes: str = "whole"
    """How DoRA magnitudes are stored, if there are any: "change" from their start, or "whole", as in older checkpoints,
    which lack this field."""
    held_out: str = ""
    """Digest of the records that `best_loss` was measured on; older checkpoints lack it, and used other records."""
    base: dict[str, str] = field(default_factory=dict)
    """Identity of the base that was trained on; empty in older checkpoints."""

    def measured(self, loss: float) -> bool:
        """Record a held-out loss; returns whether it is the best so far."""
        if not loss < self.best_loss:  # written so that NaN is no gain
            self.evals_without_gain += 1
            return False
        self.best_loss, self.best_step, self.evals_without_gain = loss, self.step, 0
        return True


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name: the adapter's."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A full copy of the adapter's weights in host memory. Under ZeRO-3 every worker must call it."""
    parameters = trainable(module)
    with gathered(parameters.values()):
        return _contiguous(parameters)


def copy_weights(source: Mapping[str, torch.Tensor], module: torch.nn.Module) -> None:
    """Set the adapter's weights in place. Under ZeRO-3 every worker must call it, with the same weights."""
    parameters = trainable(module)
    with gathered(parameters.values(), changes=True):
        for name, parameter in parameters.items():
            parameter.data.copy_(source[name])


def newest(store: Store, run_id: str) -> TrainingProgress | None:
    """The progress in the newest readable checkpoint: resuming uses the same base and the same dtype of products. None
    where there is no such checkpoint."""
    for step in complete(store, run_id):
        with contextlib.suppress(IntegrityError, ObjectMissing):
            return progress_of(store, run_id, step)
    return None


def discard_after(store: Store, run_id: str, step: int) -> None:
    """Delete the checkpoints that a lost worker group wrote, or began to write, after `step`."""
    for key, found in [*_steps(store, run_id), *_steps(store, run_id, "best")]:
        if found > step:
            _delete(store, key)


def keep_newest(store: Store, run_id: str, count: int) -> None:
    """Delete all but the `count` newest checkpoints, including older incomplete ones.

    Anything after the newest complete one stays: other workers may be writing it, as they do not wait for deletions.
    """
    kept = complete(store, run_id)[:count]
    for key, step in _steps(store, run_id):
        if kept and step < kept[0] and step not in kept:
            _delete(store, key)
    best = _steps(store, run_id, "best")
    if len(best) > 1:
        used = {progress_of(store, run_id, step).best_step for step in kept}
        for key, step in best:
            if step not in used:
                _delete(store, key)


def optimizer_tensors(engine: Any) -> dict[str, torch.Tensor]:
    """A copy in host memory of this worker's master weights and the optimizer state of each."""
    tensors = {}
    for index, (master, state) in enumerate(zero.master_partitions(engine)):
        held = {"master": master.detach(), **optimizer.saved(state)}
        tensors.update({f"{index}.{name}": tensor for name, tensor in held.items()})
    return _contiguous(tensors)


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def key_of(run_id: str, step: int, kind: str = "step") -> str:
    """Key in the store of a checkpoint's folder, or with `kind` "best" of the folder with the best weights."""
    return runs.run_key(run_id, f"{runs.CHECKPOINTS}{kind}-{step:06d}")


def progress_of(store: Store, run_id: str, step: int) -> TrainingProgress:
    """The progress in a checkpoint, without its tensors.

    Raises:
        IntegrityError: its state.json cannot be parsed.
    """
    key = f"{key_of(run_id, step)}/shared/{STATE}"
    return parse_progress(store.get(key), store.uri(key))


def parse_progress(body: bytes, uri: str) -> TrainingProgress:
    """Parse a checkpoint's state.json.

    Raises:
        IntegrityError: it is not valid.
    """
    try:
        return TrainingProgress(**json.loads(body))  # the best loss is Infinity until one is measured
    except (TypeError, ValueError) as exc:
        raise IntegrityError(f"{uri} is no state of a training: {exc}") from exc


def complete(store: Store, run_id: str) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    found = _steps(store, run_id)
    return [step for key, step in reversed(found) if store.exists(f"{key}/shared/{folders.MANIFEST}")]


def _steps(store: Store, run_id: str, kind: str = "step") -> list[tuple[str, int]]:
    """Keys and steps of the folders of one kind, oldest first."""
    names = store.folders(runs.run_key(run_id, runs.CHECKPOINTS))
    steps = sorted(int(name.removeprefix(f"{kind}-")) for name in names if name.startswith(f"{kind}-"))
    return [(key_of(run_id, step, kind), step) for step in steps]


def _delete(store: Store, key: str) -> None:
    # The manifest first: without it the checkpoint does not exist, even if the deletion is interrupted.
    store.delete([f"{key}/shared/{folders.MANIFEST}", f"{key}/{folders.MANIFEST}"])
    store.delete(item.key for item in list(store.list(f"{key}/")))
