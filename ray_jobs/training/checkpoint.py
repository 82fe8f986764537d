"""Resumable checkpoints in the store: the adapter and the optimizer, never the base.

    runs/<run_id>/checkpoints/step-000100/rank-0/     this worker's part of the optimizer: float32 masters and moments,
                                                      and which pieces of which parameters they belong to
                                          rank-1/
                                          shared/     adapter weights, state.json
                              best-000040/            best weights so far, of the step that state.json names; without
                                                      one they are those that the training began with

Each of these is a folder with a manifest. `shared` is written after all others, so a checkpoint exists when `shared`
does: a half-uploaded one is never resumed from. Release 0.1.0 has the best weights in `shared`.
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
"""Of an optimizer's file, in its metadata; release 0.1.0 wrote none."""


@dataclass
class TrainingProgress:
    """Where a training stands, beyond its tensors."""

    config_digest: str
    """The config's `training_digest`; of release 0.1.0, its `digest`."""
    num_workers: int
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    best_step: int = 0
    best_loss: float = float("inf")
    evals_without_gain: int = 0
    matmul_dtype: MatmulDtype = "bfloat16"
    """What its products were taken in; a checkpoint that does not say was trained in bfloat16."""
    loss_scale: float | None = None
    """Of a training in float16."""
    magnitudes: str = "whole"
    """What is held of magnitudes, where there are any; a checkpoint that does not say holds them, not their change."""
    held_out: str = ""
    """Names the records that `best_loss` was measured on; a checkpoint that does not say measured on others."""
    base: dict[str, str] = field(default_factory=dict)
    """Identity of the base that was trained on; a checkpoint that does not say has none."""

    def measured(self, loss: float) -> bool:
        """Note a held-out loss, and whether it is the best so far."""
        if not loss < self.best_loss:  # as no number is
            self.evals_without_gain += 1
            return False
        self.best_loss, self.best_step, self.evals_without_gain = loss, self.step, 0
        return True


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights in host memory, whole. Under ZeRO-3 every worker must call it."""
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
    """Where the newest checkpoint stands: what goes on from it does so on the same base, by the same products. None
    without one that can be read."""
    for step in complete(store, run_id):
        with contextlib.suppress(IntegrityError, ObjectMissing):
            return progress_of(store, run_id, step)
    return None


def discard_after(store: Store, run_id: str, step: int) -> None:
    """Delete what a lost worker group left of checkpoints beyond `step`."""
    for key, found in [*_steps(store, run_id), *_steps(store, run_id, "best")]:
        if found > step:
            _delete(store, key)


def keep_newest(store: Store, run_id: str, count: int) -> None:
    """Delete all but the newest checkpoints, and what is left of older ones that were never complete.

    Beyond the newest lies what other workers are writing by now: they do not wait for a deletion.
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
    """A copy, in host memory, of this worker's masters and what the optimizer holds of each."""
    tensors = {}
    for index, (master, state) in enumerate(zero.master_partitions(engine)):
        held = {"master": master.detach(), **optimizer.saved(state)}
        tensors.update({f"{index}.{name}": tensor for name, tensor in held.items()})
    return _contiguous(tensors)


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def key_of(run_id: str, step: int, kind: str = "step") -> str:
    """Of the folder of a checkpoint, or of the `best` weights of that step."""
    return runs.run_key(run_id, f"{runs.CHECKPOINTS}{kind}-{step:06d}")


def progress_of(store: Store, run_id: str, step: int) -> TrainingProgress:
    """Where a training stood, without its tensors.

    Raises:
        IntegrityError: the checkpoint does not say.
    """
    key = f"{key_of(run_id, step)}/shared/{STATE}"
    return parse_progress(store.get(key), store.uri(key))


def parse_progress(body: bytes, uri: str) -> TrainingProgress:
    """What a checkpoint's state.json says.

    Raises:
        IntegrityError: it is not one.
    """
    try:
        return TrainingProgress(**json.loads(body))  # the best loss is Infinity until one is measured
    except (TypeError, ValueError) as exc:
        raise IntegrityError(f"{uri} is no state of a training: {exc}") from exc


def complete(store: Store, run_id: str) -> list[int]:
    """Steps of the checkpoints that were written to the end, newest first."""
    found = _steps(store, run_id)
    return [step for key, step in reversed(found) if store.exists(f"{key}/shared/{folders.MANIFEST}")]


def _steps(store: Store, run_id: str, kind: str = "step") -> list[tuple[str, int]]:
    """The folders of a kind, with the step of each; oldest first."""
    names = store.folders(runs.run_key(run_id, runs.CHECKPOINTS))
    steps = sorted(int(name.removeprefix(f"{kind}-")) for name in names if name.startswith(f"{kind}-"))
    return [(key_of(run_id, step, kind), step) for step in steps]


def _delete(store: Store, key: str) -> None:
    # A manifest first: from then on it does not exist, however far the deletion gets.
    store.delete([f"{key}/shared/{folders.MANIFEST}", f"{key}/{folders.MANIFEST}"])
    store.delete(item.key for item in list(store.list(f"{key}/")))
