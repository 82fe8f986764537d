"""Worker groups without Ray, for tests of the loop itself: real processes, a real gloo or NCCL group, the real store.

Every rank of every group is forked anew by tests/warm.py: a start costs a tenth of a second instead of six of imports,
and no run can see what another left behind. CUDA survives no fork, so a rank with a GPU is started from nothing.
"""

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tests import warm

TIMEOUT_S = 600.0
GRACE_S = 10.0  # for the other ranks to fail by themselves once one is lost


@dataclass(frozen=True)
class Trained:
    """What rank 0 saw."""

    losses: list[float]
    grad_norms: list[float]
    eval_losses: list[float]
    weights: dict[str, Any]
    resumed_from: int
    stopped_early: bool
    steps: int
    matmul_dtype: str


def train(config_toml: str, rows: list[dict[str, str]], directory: Path, *, run_id: str, **group: Any) -> Trained:
    """Train on `rows`, the last eighth held out; `run_id` names the checkpoints in the store, and `group` is as for
    `in_group`."""
    return train_all({run_id: config_toml}, rows, directory, **group)[run_id]


def train_all(
    configs: Mapping[str, str], rows: list[dict[str, str]], directory: Path, **group: Any
) -> dict[str, Trained]:
    """Train with one config after the other in the same processes; each by the name of its run."""
    return in_group(train_in_rank, dict(configs), rows, directory=directory, **group)[0]


def in_group(
    function: Callable[..., Any], *arguments: Any, directory: Path, num_workers: int, use_gpu: bool = False
) -> list[Any]:
    """Call a module's function in each rank of a fresh group, in this process's environment; gives what each returned.

    `directory` takes what the ranks print. With `use_gpu` the group is NCCL's, and each rank has a GPU of its own.

    Raises:
        RuntimeError: a rank failed; the text is what the ranks printed last, tracebacks included.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    group = {"WORLD_SIZE": str(num_workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    python = sys.executable if use_gpu else os.environ.get(warm.VARIABLE, sys.executable)
    job = directory / "job.pickle"
    job.write_bytes(pickle.dumps((function, arguments, use_gpu)))
    ranks, logs = [], []
    with ExitStack() as files:
        for rank in range(num_workers):
            environment = {**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            logs.append(directory / f"rank-{rank}.log")
            ranks.append(
                subprocess.Popen(
                    [python, "-m", "tests.models.rank"],
                    stdin=files.enter_context(job.open("rb")),
                    stdout=subprocess.PIPE,
                    stderr=files.enter_context(logs[-1].open("w")),
                    cwd=warm.ROOT,
                    env=environment,
                )
            )
    found = _collect(ranks)
    if len(found) < num_workers:
        raise RuntimeError("\n".join(log.read_text() for log in logs if log.exists())[-6000:])
    return [found[rank] for rank in range(num_workers)]


def in_turn(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What one rank gets of several calls: a group's start costs as much as a short training."""
    return [function(*arguments) for arguments in calls]


def train_in_rank(configs: Mapping[str, str], rows: list[dict[str, str]]) -> dict[str, Trained]:
    """What one rank does for `train_all`."""
    from components.config import config_file
    from ray_jobs.text import answer_loss
    from ray_jobs.training import checkpoint, zero

    answer_loss.CHUNK_LOGITS = 45 * 260  # so that the losses of some micro-batches come in chunks, of others at once
    zero.LIVE_ELEMENTS = 20_000  # so that ZeRO-3 frees, gathers and prefetches a tiny base as it does a large one
    trained = {}
    for run_id, toml in configs.items():
        fitted = fit_in_rank(config_file.loads(toml), rows, run_id=run_id)
        steps = [record for record in fitted.records if record["kind"] == "train"]
        trained[run_id] = Trained(
            losses=[record["loss"] for record in steps],
            grad_norms=[record["grad_norm"] for record in steps],
            eval_losses=[record["loss"] for record in fitted.records if record["kind"] == "eval"],
            weights={
                name: w.detach().float().cpu().numpy() for name, w in checkpoint.trainable(fitted.adapted).items()
            },
            resumed_from=fitted.trained.resumed_from,
            stopped_early=fitted.trained.stopped_early,
            steps=fitted.trained.progress.step,
            matmul_dtype=fitted.recipe["matmul_dtype"],
        )
    return trained


@dataclass(frozen=True)
class InRank:
    """One rank after `ray_jobs.training.worker.fit`: what it was given, and what came of it."""

    spec: Any
    worker: Any
    store: Any
    fitted: Any
    records: list[dict[str, Any]]
    adapted: Any
    """The model with its final weights."""
    trained: Any
    """The outcome of the training."""
    recipe: Any
    """What was built."""


def fit_in_rank(
    config: Any,
    rows: list[dict[str, str]],
    *,
    run_id: str,
    start: Any = None,
    dense_base: bool = False,
    load: Callable[..., Any] | None = None,
) -> InRank:
    """Train in this rank's group on `rows`, the last eighth held out; `start` is a version to go on from.

    `dense_base` is what the plan says of that, where the config leaves it to the plan; `load` reads the base.
    """
    import torch
    import torch.distributed as dist

    from components.registry import lineage
    from components.store.store import Store
    from ray_jobs.adapters import recorded
    from ray_jobs.base import base_model
    from ray_jobs.kernels import door
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import tokenize
    from ray_jobs.training import checkpoint, opening
    from ray_jobs.training.spec import TrainSpec
    from ray_jobs.training.worker import fit
    from ray_jobs.training.zero import Worker
    from tests.doubles.datasets import validate

    config, store = config.on(dist.get_world_size()), Store.open(config.registry)
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    records = [validate(row).record for row in rows]
    cut = len(records) * 7 // 8
    splits = [tokenize(part, chat, config.model.max_length) for part in (records[:cut], records[cut:])]
    device = torch.device("cuda", dist.get_rank()) if config.ray.use_gpu else torch.device("cpu")
    worker = Worker(dist.get_rank(), dist.get_world_size(), device)
    spec = TrainSpec.of(
        config,
        run_id=run_id,
        dataset=lineage.Dataset("d0", "s3://none", "0", *map(len, splits)),
        base=lineage.Base(config.model.base, base.identity),
        pad=chat.pad,
        dense_base=dense_base,
        start=start,
        stands_on_sha256=recorded.read(config, store, start).stands_on_sha256 if start else "",
    )
    seen: list[dict[str, Any]] = []
    stop_after = int(os.environ.get("STOP_AFTER_STEP", "0"))

    def report(record: dict[str, Any]) -> None:
        seen.append(record)
        if record["step"] == stop_after:
            every = config.train.checkpoint_every_steps
            due = (stop_after - 1) // every * every if every else 0
            while due and checkpoint.complete(store, run_id)[:1] != [due]:
                time.sleep(0.05)
            os._exit(0 if worker.rank else 3)  # as a lost machine: nothing is cleaned up

    opened = opening.open_base(spec, worker, store, splits[0])
    load = load or door.load_model
    fitted = fit(spec, opened, store, tuple(splits), report=report, load=load)
    return InRank(spec, worker, store, fitted, seen, fitted.adapted, fitted.trained, fitted.recipe)


def _collect(ranks: "list[subprocess.Popen[bytes]]") -> dict[int, Any]:
    """What each rank wrote, until all have or one is lost; none is left running."""
    found: dict[int, Any] = {}
    running = {process.stdout: rank for rank, process in enumerate(ranks)}
    deadline = time.monotonic() + TIMEOUT_S
    while running and (ready := connection.wait([*running], max(0.0, deadline - time.monotonic()))):
        for stream in ready:
            rank = running.pop(stream)
            with suppress(EOFError, pickle.UnpicklingError):
                found[rank] = pickle.load(stream)  # noqa: S301 - of our own processes
            if rank not in found:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for process in ranks:
        with process, suppress(subprocess.TimeoutExpired):
            process.wait(0 if running else GRACE_S)
        process.kill()
        process.wait()
    return found
