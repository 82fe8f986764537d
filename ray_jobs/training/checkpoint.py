"""Resumable checkpoints in the store: the adapter and the optimizer, never the base.

    runs/<run_id>/checkpoints/step-000100/rank-0/     this worker's part of the optimizer: float32 masters and moments,
                                                      and which pieces of which parameters they belong to
                                          rank-1/
                                          shared/     adapter weights, best weights so far, state.json

Each of these is a folder with a manifest. `shared` is written after every rank's, so a checkpoint exists when `shared`
does: a half-uploaded one is never resumed from.
"""

import contextlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from components.config.ray import MatmulDtype
from components.records import runs
from components.shared.errors import IntegrityError, ObjectMissing, StoreError
from components.store import folders
from components.store.store import Store
from ray_jobs.base.gathered import gathered
from ray_jobs.kernels.door import Kernels
from ray_jobs.training import optimizer, partitions, zero
from ray_jobs.training.patience import is_away

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


def save(
    store: Store, run_id: str, engine: Any, progress: TrainingProgress, best: Mapping[str, torch.Tensor], *, rank: int
) -> None:
    """Write a checkpoint, which is complete on return; every worker calls it at the same step.

    Raises:
        StoreError: on every worker, where one of them found the store away.
    """
    key = key_of(run_id, progress.step)
    progress.loss_scale = zero.loss_scale(engine)
    adapter = weights(engine.module)
    with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
        folder = Path(scratch)
        pieces = partitions.here(engine, trainable(engine.module))
        save_file(_optimizer_tensors(engine), folder / OPTIMIZER, metadata={PIECES: json.dumps(pieces)})
        _publish_together(store, f"{key}/rank-{rank}", folder, engine.device)
    with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
        folder = Path(scratch)
        if rank == 0:
            save_file(adapter, folder / ADAPTER)
            save_file(_contiguous(best), folder / BEST)
            (folder / STATE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        _publish_together(store, f"{key}/shared", folder if rank == 0 else None, engine.device)


def _publish_together(store: Store, key: str, folder: Path | None, device: torch.device) -> None:
    """Publish a folder, or nothing, and return when all workers have done so.

    Raises:
        StoreError: the store is away, as this worker or another found.
    """
    failure: StoreError | None = None
    try:
        if folder is not None:
            folders.publish(store, key, {path.name: path for path in folder.iterdir()}, about={"kind": "checkpoint"})
    except StoreError as exc:
        if not is_away(exc):
            raise
        failure = exc
    has_failed = torch.tensor([int(failure is not None)], device=device)
    torch.distributed.all_reduce(has_failed)
    if has_failed.item():
        raise failure or StoreError(f"another worker could not write its part of {store.uri(key)}")


def kernels(store: Store, run_id: str) -> Kernels | None:
    """What the run's checkpoints were trained with, and so must go on with; None without one that can be read."""
    for step in complete(store, run_id):
        with contextlib.suppress(IntegrityError, ObjectMissing):
            state = f"{key_of(run_id, step)}/shared/{STATE}"
            return Kernels(parse_progress(store.get(state), store.uri(state)).matmul_dtype)
    return None


def discard_after(store: Store, run_id: str, step: int) -> None:
    """Delete what a lost worker group left of checkpoints beyond `step`."""
    for found in _steps(store, run_id):
        if found > step:
            _delete(store, run_id, found)


def keep_newest(store: Store, run_id: str, count: int) -> None:
    """Delete all but the newest checkpoints, and what is left of those that were never complete."""
    kept = complete(store, run_id)[:count]
    for step in _steps(store, run_id):
        if step not in kept:
            _delete(store, run_id, step)


def _optimizer_tensors(engine: Any) -> dict[str, torch.Tensor]:
    tensors = {}
    for index, (master, state) in enumerate(zero.master_partitions(engine)):
        held = {"master": master.detach(), **optimizer.saved(state)}
        tensors.update({f"{index}.{name}": tensor for name, tensor in held.items()})
    return _contiguous(tensors)


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def key_of(run_id: str, step: int) -> str:
    """Of a checkpoint's folder."""
    return runs.run_key(run_id, f"{runs.CHECKPOINTS}step-{step:06d}")


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
    found = sorted(_steps(store, run_id), reverse=True)
    return [step for step in found if store.exists(f"{key_of(run_id, step)}/shared/{folders.MANIFEST}")]


def _steps(store: Store, run_id: str) -> list[int]:
    names = store.folders(runs.run_key(run_id, runs.CHECKPOINTS))
    return [int(name.removeprefix("step-")) for name in names if name.startswith("step-")]


def _delete(store: Store, run_id: str, step: int) -> None:
    # The manifest first: from then on it does not exist, however far the deletion gets.
    key = key_of(run_id, step)
    store.delete([f"{key}/shared/{folders.MANIFEST}"])
    store.delete(item.key for item in list(store.list(f"{key}/")))
