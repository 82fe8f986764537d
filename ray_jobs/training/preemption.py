"""A node of the group that is about to be taken: by its cloud, by Kubernetes, or by `ray drain-node`.

A watcher of Ray Train's asks the cluster every five seconds which nodes are being drained. At the end of a step the
workers ask it, save a checkpoint and leave: Ray Train starts them anew at once, elsewhere, and no step is lost. That
counts against `ray.max_preemption_failures`, not against `ray.max_failures`.
"""

import time
from typing import Never

import torch
import torch.distributed as dist

from ray_jobs.training.group import Worker

ASK_EVERY_S = 2.0
"""To ask is a call to another process, in which all workers wait for each other."""


class Watch:
    """Asks, on behalf of a worker, now and then."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._asked_at = time.monotonic()

    def is_preempted(self) -> bool:
        """Whether a node of the group is about to be taken. All workers call it after the same step."""
        import ray.train

        is_due = torch.tensor([int(time.monotonic() - self._asked_at >= ASK_EVERY_S)], device=self._worker.device)
        dist.broadcast(is_due, src=0)  # one clock says when
        if not is_due.item():
            return False
        self._asked_at = time.monotonic()
        return ray.train.get_preemption_info() is not None


def leave(step: int) -> Never:
    """End this worker, of a group that all leave; the checkpoint of `step` is complete.

    Raises:
        RayActorError: what Ray Train takes for a worker whose node was taken.
    """
    from ray.exceptions import RayActorError

    raise RayActorError(
        error_msg=f"a node of the workers is about to be taken: they go on from step {step} elsewhere", preempted=True
    )
