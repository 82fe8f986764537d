"""The training loop of one worker: steps, evaluations on held-out records, early stopping, checkpoints.

All randomness comes from `train.seed`: batches are a pure function of seed and epoch, and dropout is also seeded by
step and rank, so a resumed training takes exactly the steps of an uninterrupted one.
"""

import math
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from components.config.train import TrainConfig
from components.shared.errors import Diverged
from components.shared.protocol import say
from components.store.store import Store
from ray_jobs.base import together
from ray_jobs.text import answer_loss
from ray_jobs.text.batching import NO_RECORD, TokenizedSplit, by_length, plan_epoch, share
from ray_jobs.training import checkpoint, zero
from ray_jobs.training.checkpoint import CheckpointWriter, TrainingProgress
from ray_jobs.training.spec import TrainSpec
from ray_jobs.training.zero import Worker

# Preemption of a node of the group: by its cloud provider, by Kubernetes, or by `ray drain-node`.
#
# A watcher in Ray Train asks the cluster every five seconds which nodes are being drained. At the end of a step the
# workers query it, save a checkpoint and exit: Ray Train restarts them at once on other nodes, and no step is lost.
# This counts as a preemption, not against `ray.max_failures`.

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


# Detecting a worker that slows down the others, since all of them wait for the slowest in each step.
#
# The times of forward passes are compared, in which no worker waits for another: records are distributed so that all
# workers have similar ones. Under ZeRO-3 all workers gather each layer together, so nothing is known of a single one.

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
        timings: list[tuple[float, str]] = together.all_gather((mine, socket.gethostname()))
        rank = straggler([seconds for seconds, _ in timings])
        if self._worker.rank == 0 and rank is not None and rank not in self._named:
            self._named.add(rank)
            seconds, host = timings[rank]
            others = statistics.median_high(other for i, (other, _) in enumerate(timings) if i != rank)
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


Report = Callable[[dict[str, Any]], None]
Splits = tuple[TokenizedSplit, TokenizedSplit]
"""The records to train on, and those that are held out."""


@dataclass
class TrainedAdapter:
    """The result of a finished training: the weights to publish, and how they were obtained."""

    weights: dict[str, torch.Tensor]
    progress: TrainingProgress
    stopped_early: bool
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss: float | None = None
    resumed_from: int = 0


def learning_rate_at(step: int, *, peak: float, num_steps: int, warmup_share: float) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up, then a cosine to zero after the last."""
    num_warmup = math.ceil(warmup_share * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))


def num_steps(train: TrainConfig, num_records: int) -> int:
    """Number of optimizer steps of the whole training."""
    in_epochs = math.ceil(num_records / train.batch_size) * train.epochs
    return min(train.max_steps, in_epochs) if train.max_steps else in_epochs


def eval_steps(train: TrainConfig, num_records: int) -> set[int]:
    """Numbers of steps after which the held-out loss is measured; the last step is always one of them."""
    total = num_steps(train, num_records)
    steps = {total}
    if train.evals_per_epoch:
        every = max(1, math.ceil(math.ceil(num_records / train.batch_size) / train.evals_per_epoch))
        steps.update(range(every, total, every))
    return steps


def run(
    engine: Any,
    spec: TrainSpec,
    store: Store,
    worker: Worker,
    splits: Splits,
    *,
    report: Report,
    watch: Watch | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
) -> TrainedAdapter:
    """Train to the end, from the newest complete checkpoint of this run if there is one. The result is interpolated
    with the weights `start`, at which the training began, by `train.start_share`.

    `report` gets one record for each step and each evaluation, on every rank. `watch` says when a node is about to be
    preempted; None means never. Raises RayActorError: a node is about to be preempted, and a checkpoint has been
    written.
    """
    train, (train_split, eval_split) = spec.train, splits
    num_records = len(train_split)
    total, measured = num_steps(train, num_records), eval_steps(train, num_records)
    measure = partial(held_out_loss, engine, eval_split, worker=worker, batch_size=train.micro_batch_size, pad=spec.pad)
    fresh = TrainingProgress(
        spec.training_digest,
        worker.num_workers,
        matmul_dtype=worker.kernels.dtype,
        magnitudes="change",
        held_out=eval_split.digest,
        base=dict(spec.base.identity),
    )
    progress, best = checkpoint.resume(store, spec.run_id, engine, fresh, rank=worker.rank)
    trained = TrainedAdapter(best, progress, stopped_early=False, resumed_from=progress.step)
    started, pace = time.monotonic() - progress.elapsed_s, Pace(worker, zero_stage=train.zero_stage)
    with CheckpointWriter(store, spec.run_id, rank=worker.rank) as checkpoints:
        for batch, epoch in _batches(train, train_split, start=progress.step, stop=total):
            began = time.monotonic()
            loss, grad_norm, num_tokens = take_step(
                engine, batch, spec=spec, worker=worker, split=train_split, step=progress.step, total=total, pace=pace
            )
            if not math.isfinite(loss):
                raise Diverged(
                    f"training diverged: the loss at step {progress.step} is {loss}; lower train.learning_rate, now "
                    f"{spec.learning_rate:g}"
                )
            ended = time.monotonic()
            progress.step += 1
            progress.tokens += num_tokens
            progress.elapsed_s = ended - started
            trained.first_loss = loss if trained.first_loss is None else trained.first_loss
            trained.last_loss = loss
            pace.compare(progress.step)
            report(
                {
                    "kind": "train",
                    "step": progress.step,
                    "num_steps": total,
                    "tokens": progress.tokens,
                    "learning_rate": engine.optimizer.param_groups[0]["lr"],
                    "elapsed_s": progress.elapsed_s,
                    "epoch": epoch,
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "tokens_per_s": num_tokens / (ended - began),
                }
            )
            if progress.step in measured:
                trained.eval_loss = measure()
                report({"kind": "eval", "step": progress.step, "loss": trained.eval_loss, "records": len(eval_split)})
                if progress.measured(trained.eval_loss):
                    best = checkpoint.weights(engine.module)
                trained.stopped_early = 0 < train.early_stopping_patience <= progress.evals_without_gain
            if trained.stopped_early or progress.step == total:
                break
            is_preempted = watch is not None and watch.is_preempted()
            if is_preempted or (train.checkpoint_every_steps and progress.step % train.checkpoint_every_steps == 0):
                checkpoints.write(engine, progress, best)
                if is_preempted and checkpoints.finish():
                    from ray.exceptions import RayActorError

                    raise RayActorError(  # Ray Train takes it for a worker whose node was preempted
                        error_msg=f"a node of the workers is about to be taken: they go on from step {progress.step} "
                        "elsewhere",
                        preempted=True,
                    )

    if train.early_stopping_patience:
        trained.weights, trained.eval_loss = best, progress.best_loss
    else:
        trained.weights = checkpoint.weights(engine.module)
    if start is not None and train.start_share:
        trained.weights = between(trained.weights, start, train.start_share)
        checkpoint.copy_weights(trained.weights, engine.module)
        trained.eval_loss = measure()
    return trained


def between(
    trained: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """Interpolate linearly between the weights `trained` and `start`: theta = (1 - share) trained + share start
    (WiSE-FT, arXiv:2109.01903, section 3), computed in float32."""
    return {name: weight.float().lerp(start[name].float(), share).to(weight.dtype) for name, weight in trained.items()}


@torch.no_grad()
def held_out_loss(engine: Any, split: TokenizedSplit, *, worker: Worker, batch_size: int, pad: int) -> float:
    """Mean loss in nats per answer token over a split that is divided among the workers."""
    engine.module.eval()
    total = torch.zeros(2, dtype=torch.float64)
    mine = np.arange(worker.rank, len(split), worker.num_workers)
    rounds = [mine[indices] for indices in by_length(split.lengths[mine], batch_size)]
    # Under ZeRO-3 a forward pass is collective: a worker without further records repeats a record, without counting it.
    idle = math.ceil(math.ceil(len(split) / worker.num_workers) / batch_size) - len(rounds)
    for number, indices in enumerate([*rounds, *[np.array([0])] * idle]):
        nll = answer_loss.records_nll(engine.module, split, indices, pad, device=worker.device)
        if number < len(rounds):
            total += torch.tensor([nll.double().sum().item(), nll.numel()], dtype=torch.float64)
    engine.module.train()
    zero.finish_forward(engine)
    total = total.to(worker.device)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def _batches(
    train: TrainConfig, split: TokenizedSplit, *, start: int, stop: int
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Yield the batches of the steps from `start` up to, not including, `stop`, each with its epoch."""
    per_epoch = math.ceil(len(split) / train.batch_size)
    for epoch in range(start // per_epoch, math.ceil(stop / per_epoch)):
        plan = plan_epoch(split.lengths, batch_size=train.batch_size, seed=train.seed, epoch=epoch)
        first = epoch * per_epoch
        for batch in plan[max(0, start - first) : stop - first]:
            yield batch, epoch


def take_step(
    engine: Any,
    batch: npt.NDArray[np.int64],
    *,
    spec: TrainSpec,
    worker: Worker,
    split: TokenizedSplit,
    step: int,
    total: int,
    pace: Pace,
) -> tuple[float, float, int]:
    """Take one optimizer step; returns the mean loss over the batch's answer tokens, the gradient norm and the number
    of tokens."""
    train = spec.train
    rate = learning_rate_at(step, peak=spec.learning_rate, num_steps=total, warmup_share=train.warmup_share)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(hash((train.seed, step, worker.rank)))
    answer_tokens = int(split.num_answer_tokens[batch].sum())
    rounds = share(
        batch,
        split.lengths,
        micro_batch_size=train.micro_batch_size,
        max_tokens=train.max_tokens,
        num_workers=worker.num_workers,
    )
    # DeepSpeed averages over rounds and workers, but the loss is a mean over tokens, which are not spread evenly.
    scale = zero.accumulation(spec) * worker.num_workers / answer_tokens
    packs = answer_loss.may_pack(spec)
    nll_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
    for number, indices in enumerate(rounds, start=1):
        if train.max_tokens:
            engine.set_gradient_accumulation_boundary(number == len(rounds))
        mine = indices[worker.rank]
        records = mine[mine != NO_RECORD]
        with pace.forward():  # all workers join each pass: one without records repeats a record, which is not counted
            nll = answer_loss.records_nll(
                engine, split, records if len(records) else batch[:1], spec.pad, device=worker.device, packs=packs
            ).sum() * bool(len(records))
        engine.backward(nll * scale)
        engine.step()
        nll_sum += nll.detach().double()
    dist.all_reduce(nll_sum)
    return float(nll_sum) / answer_tokens, float(engine.get_global_grad_norm() or 0.0), int(split.lengths[batch].sum())
