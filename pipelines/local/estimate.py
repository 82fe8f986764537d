"""Estimates of how long a run takes on this machine, before it starts or while it starts."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.config.schema import RunConfig
from components.shared.cpus import FAST_AT_BFLOAT16
from components.shared.durations import estimated_duration
from components.shared.errors import FineloopError
from pipelines.local.job import Job, answer

LONG_S = 1800.0


def estimate_here(config: RunConfig, config_path: Path, home: Path) -> list[str]:
    """Return lines for people on how long a run takes here; if the estimate fails, a line says why."""
    return _lines_of(_job(config_path, home), config)


@contextmanager
def estimate_in_background(config: RunConfig, config_path: Path, home: Path) -> Iterator[Callable[[], list[str]]]:
    """Estimate in a thread while a run starts; yields a function that returns the lines once, when they are there.

    Before and after that it returns an empty list. A base that a package ships is converted first, so that the run need
    not do it. The thread ends with the context.
    """
    is_over, is_reported = threading.Event(), False
    job = replace(_job(config_path, home), arguments=("--convert",))

    def unless_over() -> None:
        if is_over.is_set():
            raise CancelledError

    def news() -> list[str]:
        nonlocal is_reported
        if is_reported or not made.done():
            return []
        is_reported = True
        return made.result()

    with ThreadPoolExecutor(max_workers=1) as pool:
        made = pool.submit(_lines_of, job, config, unless_over)
        try:
            yield news
        finally:
            is_over.set()


def _job(config_path: Path, home: Path) -> Job:
    cache = os.environ.get("FINELOOP_CACHE") or str(home.absolute() / "cache")
    return Job("ray_jobs.estimate", str(config_path.absolute()), environment={"FINELOOP_CACHE": cache})


def _lines_of(job: Job, config: RunConfig, on_tick: Callable[[], None] = lambda: None) -> list[str]:
    try:
        return list(estimate_lines(config, answer(job, on_tick=on_tick)))
    except FineloopError as exc:
        return [f"how long it takes here is unknown: {exc}"]


def estimate_lines(config: RunConfig, estimate: dict[str, Any]) -> Iterator[str]:
    """Yield lines for people, from the answer of `ray_jobs.estimate`."""
    if estimate["tokens_per_s"] is None:
        yield f"how long it takes here is unknown: {estimate['unknown_because']}"
        return
    speed = f"{estimate['tokens_per_s']:.0f} tokens/s, products in {estimate['matmul_dtype']}"
    if estimate["run_s"] is None:
        yield f"training at about {speed}; how long it takes is unknown: {estimate['unknown_because']}"
        return
    run, training, evaluation = (estimated_duration(estimate[part]) for part in ("run_s", "train_s", "evaluate_s"))
    yield f"a run takes about {run} here: {training} of training at {speed}, {evaluation} of evaluation"
    if estimate["run_s"] > LONG_S:
        yield f"to make it shorter: {'; '.join(_shorter(config, estimate))}"


def _shorter(config: RunConfig, estimate: dict[str, Any]) -> Iterator[str]:
    """Yield ways to make the run shorter, the most effective first."""
    if estimate["train_s"] >= estimate["evaluate_s"]:
        limit = config.data.max_records
        yield (
            f"fewer records (--set data.max_records, now {limit})" if limit else "fewer records: --set data.max_records"
        )
        if config.train.epochs > 1:
            yield f"fewer passes (--set train.epochs, now {config.train.epochs})"
        yield "fewer steps: --set train.max_steps"
    else:
        yield f"fewer held-out records (--set evaluate.records, now {config.evaluate.records})"
        yield "shorter answers: --set evaluate.max_new_tokens"
    if config.ray.cpu_matmul_dtype == "bfloat16" and estimate["processor"]["kind"] not in FAST_AT_BFLOAT16:
        yield "--set ray.cpu_matmul_dtype=auto, which multiplies in what this processor is fastest at"
    yield "a smaller model.base; a GPU, with --set ray.use_gpu=true"
