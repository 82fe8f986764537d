"""What travels to the workers of a training."""

import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

from components.registry import lineage
from ray_jobs.training.train_job import Stopwatch, TrainJob

ROOT = Path(__file__).parents[3]


def test_parts_follow_each_other_through_the_processes_of_a_training():
    with mock.patch("time.time", side_effect=[1002.5, 1003.0]):
        watch = Stopwatch(1000.0)
        watch.lap("data")
        job = TrainJob("", "run", lineage.Dataset("d", "s3://d", "0", 1, 1), lineage.Base("b", {}), 0, watch=watch)
        arrived: TrainJob = pickle.loads(pickle.dumps(job))  # noqa: S301 - our own
        arrived.watch.lap("workers start")
    assert [(each.part, each.seconds) for each in arrived.watch.parts] == [("data", 2.5), ("workers start", 0.5)]
    assert arrived.watch.began_at == "1970-01-01T00:16:40+00:00"


def test_whoever_reads_a_job_without_training_waits_for_no_model_code():
    check = "import sys, ray_jobs.training.job as _; print(*{'torch', 'transformers', 'peft'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
