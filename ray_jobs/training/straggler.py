"""Detecting a worker that slows down the others, since all of them wait for the slowest in each step.

The times of forward passes are compared, in which no worker waits for another: records are distributed so that all
workers have similar ones. Under ZeRO-3 all workers gather each layer together, so nothing is known of a single one.
"""

import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from components.shared.protocol import say
from ray_jobs.base import together
from ray_jobs.training.group import Worker

EVERY_STEPS = 50
SLOWER = 1.25
"""Ratio to the other workers' time from which a worker is a straggler."""


class Pace:
    """Times a worker's forward passes, and compares them with the other workers' at intervals."""

    def __init__(self, worker: Worker, *, zero_stage: int) -> None:
        self._worker = worker
        self._is_known = zero_stage < 3 and worker.num_workers > 1
        self._seconds = 0.0
        self._on_gpu: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._named: set[int] = set()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time a forward pass, in which this worker computes by itself."""
        if not self._is_known:
            yield
        elif self._worker.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._on_gpu.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def compare(self, step: int) -> None:
        """Report the slowest worker every EVERY_STEPS steps, each rank once; all workers call it after a step."""
        if not self._is_known or step % EVERY_STEPS:
            return
        mine = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._on_gpu) / 1000
        self._seconds, self._on_gpu = 0.0, []
        found: list[tuple[float, str]] = together.all_gather((mine, socket.gethostname()))
        rank = straggler([seconds for seconds, _ in found])
        if self._worker.rank == 0 and rank is not None and rank not in self._named:
            self._named.add(rank)
            seconds, host = found[rank]
            others = statistics.median_high(each for i, (each, _) in enumerate(found) if i != rank)
            say(
                "finetune",
                f"worker {rank} on {host} holds up the others: its forward passes took {seconds:.1f} s and theirs "
                f"{others:.1f} s, up to step {step}",
            )


def straggler(seconds: Sequence[float]) -> int | None:
    """The rank that is more than SLOWER times as slow as the median of the others; None if there is none."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median_high([*seconds[:rank], *seconds[rank + 1 :]])
    return rank if seconds[rank] > SLOWER * others else None
