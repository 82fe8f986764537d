"""Resource usage of a training, as measured by the workers when it has ended."""

from datetime import datetime

import torch
import torch.distributed as dist

from components.config.ray import price_per_hour
from components.config.schema import RunConfig
from components.records.steps import Usage
from components.store import client
from ray_jobs.training.checkpoint import TrainingProgress
from ray_jobs.training.group import Worker
from ray_jobs.training.metrics_log import MetricsLog
from ray_jobs.training.train_job import TrainJob


def measured(
    job: TrainJob,
    config: RunConfig,
    worker: Worker,
    progress: TrainingProgress,
    metrics: MetricsLog | None,
    trained_at: datetime,
) -> Usage | None:
    """The usage of all workers, on the worker that has `metrics`, None elsewhere; every worker must call this."""
    asked = client.so_far()
    total = torch.tensor([asked.requests, asked.read_bytes, asked.written_bytes], device=worker.device)
    dist.all_reduce(total)
    if metrics is None:
        return None
    requests, read_bytes, written_bytes = total.tolist()
    gpu = torch.cuda.get_device_name(worker.device) if worker.device.type == "cuda" else ""
    held_s = worker.num_workers * (trained_at.timestamp() - job.watch.began)
    flops = progress.tokens * job.flops_per_token if job.flops_per_token else None
    price, source = price_per_hour(config.ray, gpu) or (None, "")
    return Usage(
        workers=worker.num_workers,
        gpu=gpu,
        held_s=round(held_s, 3),
        in_steps_s=round(worker.num_workers * progress.elapsed_s, 3),
        tokens=progress.tokens,
        restarts=metrics.restarts,
        steps_repeated=metrics.steps_repeated,
        flops=flops,
        flops_with_parents=None if flops is None or job.flops_before is None else flops + job.flops_before,
        s3_requests=requests,
        s3_read_bytes=read_bytes,
        s3_written_bytes=written_bytes,
        price=None if price is None else price * held_s / 3600,
        price_source=source,
    )
