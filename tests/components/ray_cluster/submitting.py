"""A step that submits a job, in a process of its own: one that can be killed."""

import sys

from components.config.ray import RayConfig
from components.ray_cluster.backend import Job

SUBMITTING = """
import os, sys
from components.ray_cluster.backend import Job
from components.config.ray import RayConfig
from components.ray_cluster.submit import submit_and_wait
job = Job(run_id=sys.argv[1], task='finetune', command=tuple(sys.argv[3:]), timeout_s=60)
submit_and_wait(job, RayConfig.model_validate_json(sys.argv[2]), poll_s=0.05)
"""


def submitting(job: Job, ray: RayConfig | None = None) -> list[str]:
    """The command of the step."""
    return [sys.executable, "-c", SUBMITTING, job.run_id, (ray or RayConfig()).model_dump_json(), *job.command]
