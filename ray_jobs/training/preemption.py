"""Preemption of a node of the group: by its cloud provider, by Kubernetes, or by `ray drain-node`.

A watcher in Ray Train asks the cluster every five seconds which nodes are being drained. At the end of a step the
workers query it, save a checkpoint and exit: Ray Train restarts them at once on other nodes, and no step is lost. This
counts against `ray.max_preemption_failures`, not against `ray.max_failures`.
"""

import time
from typing import Never

import torch
import torch.distributed as dist

from ray_jobs.training.group import Worker

ASK_EVERY_S = 2.0
"""Minimum seconds between queries: each calls another process, while all workers wait for each other."""


class Watch:
    """Queries preemption on behalf of a worker, at intervals."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._asked_at = time.monotonic()

    def is_preempted(self) -> bool:
        """Whether a node of the group is about to be preempted. All workers must call this after the same step."""
        import ray.train

        is_due = torch.tensor([int(time.monotonic() - self._asked_at >= ASK_EVERY_S)], device=self._worker.device)
        dist.broadcast(is_due, src=0)  # rank 0's clock decides
        if not is_due.item():
            return False
        self._asked_at = time.monotonic()
        return ray.train.get_preemption_info() is not None


def leave(step: int) -> Never:
    """End this worker, as all workers of the group do; the checkpoint of `step` is complete.

    Raises:
        RayActorError: always; Ray Train takes it for a worker whose node was preempted.
    """
    from ray.exceptions import RayActorError

    raise RayActorError(
        error_msg=f"a node of the workers is about to be taken: they go on from step {step} elsewhere", preempted=True
    )
