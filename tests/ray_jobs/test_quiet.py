"""A process that uses ray_jobs prints no line of bitsandbytes or DeepSpeed that is no error."""

import os
import subprocess
import sys

ASK = """
import ray_jobs
import bitsandbytes.backends.cpu.ops as ops
ops.logger.warning("Please make sure you already pip install kernels")
import deepspeed.accelerator
print(deepspeed.accelerator.get_accelerator().device_name())
from deepspeed.utils import logger
logger.error("an error is shown")
"""


def test_other_libraries_say_nothing_of_kernels_and_devices() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", ASK]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = answer.stdout + answer.stderr
    assert "cpu" in answer.stdout
    assert "an error is shown" in said
    assert "Setting accelerator" not in said
    assert "kernels" not in said
