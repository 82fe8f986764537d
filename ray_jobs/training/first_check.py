"""The check before the first step of a training: comparing the loss of the unsharded and of the sharded model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from components.config.schema import RunConfig
from components.store.store import Store
from ray_jobs.base import base_model
from ray_jobs.kernels.door import Kernels
from ray_jobs.training import step_zero, trained_model, zero
from ray_jobs.training.group import Worker

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class FirstCheck:
    """Checks that the sharded model has the loss of the unsharded one before its first step; see `step_zero`."""

    config: RunConfig
    base: base_model.Base
    probe: dict[str, torch.Tensor]
    start: Mapping[str, torch.Tensor] | None
    on_cpu: Kernels
    """Kernels for the products of the whole model on a CPU."""
    expected: torch.Tensor | None = None
    """The losses of the unsharded model's answer tokens, on rank 0."""

    @property
    def is_read_alone(self) -> bool:
        """Whether the base's loss is computed layer by layer from its files, without an adapter."""
        return self.config.train.zero_stage == 3 and not base_model.is_quantised(self.base)

    def measure_whole(self, worker: Worker, store: Store) -> None:
        """Compute the expected loss under ZeRO-3, on rank 0, before anything is sharded."""
        if self.config.train.zero_stage < 3 or worker.rank > 0:
            return
        if self.is_read_alone:
            self.expected = step_zero.known_base_nll(
                store, self.config, self.base, self.probe, self.on_cpu, worker.dtype
            )
        else:
            whole = trained_model.assemble(
                self.config, self.base, use_gpu=False, kernels=self.on_cpu, dtype=worker.dtype, start=self.start
            )
            self.expected = step_zero.probe_nll(whole, self.probe, torch.device("cpu"))

    def measure_unsharded(self, adapted: "PeftModel", worker: Worker) -> None:
        """Compute the expected loss below ZeRO-3, where every worker holds the whole model."""
        if self.config.train.zero_stage < 3:
            self.expected = step_zero.probe_nll(adapted, self.probe, worker.device)

    def require_same(self, engine: Any, worker: Worker) -> None:
        """Compare the losses; raises as `step_zero.require_same` does."""
        # A fresh adapter does not change the loss; the initial weights of LoftQ or of an earlier version do.
        is_fresh = self.start is None and self.config.method.row.init == "default"
        with_adapter = is_fresh or not self.is_read_alone
        losses = step_zero.probe_nll(engine.module, self.probe, worker.device, with_adapter=with_adapter)
        zero.finish_forward(engine)
        expected = self.expected if worker.rank == 0 else None
        step_zero.require_same(losses, expected, worker=worker, zero_stage=self.config.train.zero_stage)
