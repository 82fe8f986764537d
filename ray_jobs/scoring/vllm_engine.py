"""Greedy answers by vLLM (evaluate.engine), which asks for other releases of transformers than training: a process in
an environment of its own gets and gives tokens, so that chat template, ends and limits stay the evaluation's."""

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from components.shared.errors import ConfigError, JobError
from ray_jobs.scoring import in_vllm

PYTHON = "FINELOOP_VLLM_PYTHON"
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "DO_NOT_TRACK": "1"}

Request = tuple[str, list[Any]]
"""Arguments of vllm.LLM as JSON, and for it: the adapter's folder if any, prompts, their limit and ends."""


def answers(requests: Sequence[Request]) -> list[list[list[int]]]:
    """The tokens of the answers, by one engine for all that it can serve. Raises as `run` does."""
    result: dict[int, list[list[int]]] = {}
    for engine in dict.fromkeys(engine for engine, _ in requests):
        places = [place for place, (its, _) in enumerate(requests) if its == engine]
        told = run(in_vllm.__file__, engine, work=[requests[place][1] for place in places])
        result.update(zip(places, json.loads(told.splitlines()[-1]), strict=True))
    return [result[place] for place in range(len(requests))]


def run(*arguments: str, work: Sequence[Any] = ()) -> str:
    """Run the Python that has vLLM; returns its stdout. Raises ConfigError, or JobError where there is `work`."""
    environment, gpus = os.environ | ENVIRONMENT, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if work and len(gpus) > 1:  # Ray shows those of a node to each of its workers
        environment["CUDA_VISIBLE_DEVICES"] = gpus[torch.cuda.current_device()]
    command = ["env", os.environ.get(PYTHON, ""), "-I", *arguments]  # env says of a missing one what is wrong
    done = subprocess.run(command, input=json.dumps(work), text=True, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise (JobError if work else ConfigError)(
            f"evaluate.engine vllm: the Python that {PYTHON} names, in an environment with vLLM in the workers' image, "
            f"ended with {done.returncode}: " + "\n".join(done.stderr.strip().splitlines()[-5:])
        )
    return done.stdout
