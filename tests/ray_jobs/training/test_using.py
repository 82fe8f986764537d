"""What a training says that it used, beside figures worked out by hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from components.config.schema import RunConfig
from components.records.steps import Usage
from components.store import client
from components.store.store import Store
from ray_jobs.training.checkpoint import TrainingProgress
from ray_jobs.training.metrics_log import MetricsLog
from ray_jobs.training.publishing import usage_of
from ray_jobs.training.zero import Worker
from tests.models.spec import spec_of


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("before", "flops", "with_parents"), [(0.0, 2e12, 2e12), (5e12, 2e12, 7e12), (None, 2e12, None)]
)
@pytest.mark.usefixtures("group")
def test_hours_are_of_all_workers_and_operations_of_all_tokens(
    config: RunConfig, store: Store, before: float | None, flops: float, with_parents: float | None
) -> None:
    spec = spec_of(config, run_id="used", flops_per_token=2e9, flops_before=before)
    four = Worker(0, 4, torch.device("cpu"))
    progress = TrainingProgress("", 4, step=10, tokens=1000, elapsed_s=1350.0)
    metrics = MetricsLog(store, "used")
    asked = client.so_far().requests
    used = usage_of(spec, four, progress, metrics, seconds=1800)
    assert used is not None
    assert used == Usage.model_validate_json(used.model_dump_json())  # as finetune.json and lineage.json hold it
    assert (used.hours, used.in_steps_s, used.tokens) == (2.0, 5400.0, 1000)
    assert (used.flops, used.flops_with_parents) == (flops, with_parents)
    assert (used.price, used.restarts, used.s3_requests) == (None, 0, asked)
    assert usage_of(spec, four, progress, None, seconds=1800) is None
