"""What is lines of a run's length before it starts, or as it does."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.config.schema import RunConfig
from pipelines.local import estimate
from tests.waiting import PATIENCE_S, wait_until

ESTIMATE = {
    "processor": {"name": "AMD EPYC 7R13 Processor", "kind": "AVX2", "cores": 2},
    "processor_told": "2 cores of AMD EPYC 7R13 Processor, AVX2",
    "matmul_dtype": "float32",
    "tokens_per_s": 150.0,
    "train_s": 460.0,
    "evaluate_s": 80.0,
    "run_s": 600.0,
    "unknown_because": None,
}


def lines(config: RunConfig, **changes: Any) -> str:
    return "\n".join(estimate.estimate_lines(config, {**ESTIMATE, **changes}))


def test_a_run_of_minutes_is_estimated_in_one_line(make_config: Callable[..., RunConfig]) -> None:
    assert lines(make_config()) == (
        "a run takes about 10 min here: 8 min of training at 150 tokens/s, products in float32, 80 s of evaluation"
    )


def test_a_run_of_more_than_half_an_hour_says_what_would_make_it_shorter(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("data.max_records=5000", "train.epochs=3", "ray.cpu_matmul_dtype=bfloat16")
    text = lines(config, run_s=1801.0, train_s=1700.0, matmul_dtype="bfloat16")
    for way in ("data.max_records, now 5000", "train.epochs, now 3", "ray.cpu_matmul_dtype=auto", "ray.use_gpu=true"):
        assert way in text
    evaluating = lines(config, run_s=2000.0, train_s=100.0, evaluate_s=1800.0)
    assert "evaluate.records" in evaluating
    assert "data.max_records" not in evaluating


def test_what_is_unknown_is_said_with_its_reason(make_config: Callable[..., RunConfig]) -> None:
    reason = {"unknown_because": "the data are in S3", "run_s": None, "train_s": None}
    assert lines(make_config(), **reason) == (
        "training at about 150 tokens/s, products in float32; how long it takes is unknown: the data are in S3"
    )
    assert lines(make_config(), **reason, tokens_per_s=None) == "how long it takes here is unknown: the data are in S3"


@pytest.mark.slow
def test_an_estimate_that_fails_is_a_line_and_no_failure(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (line,) = estimate.estimate_here(make_config(), tmp_path / "nowhere.toml", tmp_path)
    assert line.startswith("how long it takes here is unknown: ")
    assert "nowhere.toml" in line


@pytest.mark.slow
def test_beside_a_run_that_starts_it_is_printed_once(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with estimate.estimate_in_background(make_config(), tmp_path / "nowhere.toml", tmp_path) as news:
        assert "nowhere.toml" in wait_until(news)[0]
        assert news() == []


def test_it_ends_with_the_run_that_it_was_made_beside(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config, gave_up = tmp_path / "endless.toml", threading.Event()
    os.mkfifo(config)  # which the estimate would read for ever

    def give_up() -> None:
        gave_up.set()
        config.write_text("", encoding="utf-8")

    at_last = threading.Timer(2 * PATIENCE_S, give_up)
    at_last.start()
    with estimate.estimate_in_background(make_config(), config, tmp_path):
        wait_until(lambda: running(config))
    at_last.cancel()
    assert not gave_up.is_set()
    assert not running(config)


def running(config: Path) -> list[str]:
    """Processes that have this file among their arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [entry.parent.name] if os.fsencode(config) in entry.read_bytes() else []
    return found
