"""transformers takes no kernels from the hub in a job, unless the environment of the job says so."""

import os
import subprocess
import sys

import pytest

READ = "_TRANSFORMERS_USE_HUB_KERNELS"
ASK = f"import ray_jobs; from transformers.integrations import hub_kernels; print(hub_kernels.{READ})"


@pytest.mark.parametrize(("said", "enabled"), [({}, "0"), ({"USE_HUB_KERNELS": "1"}, "1")], ids=str)
def test_a_job_takes_kernels_from_the_hub_only_where_its_environment_says_so(
    said: dict[str, str], enabled: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "USE_HUB_KERNELS"} | said
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK], env=environment, capture_output=True, text=True
    )
    assert answer.stdout.strip() == enabled, answer.stderr
