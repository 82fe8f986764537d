"""A step that submits a job, in a process of its own that can be killed: a module, so that tests/warm.py forks it."""

import os
import sys

from components.config.ray import RayConfig
from components.ray_cluster import submit
from components.ray_cluster.backend import Job
from tests import warm


def submitting(job: Job, ray: RayConfig | None = None, *, python: str = "") -> list[str]:
    """The command of the step."""
    config = (ray or RayConfig()).model_dump_json()
    return [python or os.environ[warm.VARIABLE], "-m", __name__, job.run_id, config, *job.command]


if __name__ == "__main__":
    run_id, config, *command = sys.argv[1:]
    submitted = Job(run_id=run_id, task="finetune", command=tuple(command), timeout_s=60)
    submit.POLL_S = 0.05
    submit.submit_and_wait(submitted, RayConfig.model_validate_json(config))
