"""A step without its pipeline: start a command as a Ray job and wait for it, as every step does.

python -m tests.cluster.follow RUN_ID [KEY=VALUE ...] -- COMMAND ...
"""

import logging
import sys

from components.config import config_file
from components.ray_cluster.backend import Job
from components.ray_cluster.submit import submit_and_wait
from components.shared.errors import FineloopError
from pipelines.configs import DEFAULT_CONFIG

TASK = "finetune"


def main(run_id: str, *rest: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    split = rest.index("--")
    config = config_file.load(DEFAULT_CONFIG, rest[:split])
    job = Job(run_id, TASK, rest[split + 1 :], timeout_s=1800.0, patience_s=config.ray.patience_s)
    try:
        submit_and_wait(job, config.ray)
    except FineloopError as exc:
        print(f"{type(exc).__name__}: {exc}", flush=True)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
