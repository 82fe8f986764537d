"""The built-in example as the benchmarks read it, and what several of them share."""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from components.config import config_file
from pipelines.configs import DEFAULT_CONFIG


def parser(
    name: str, about: str | None, *, threads: int = 0, rounds: int = 0, record: bool = False
) -> argparse.ArgumentParser:
    """With the options that several benchmarks have, where a default of theirs is named."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if threads:
        made.add_argument("--threads", type=int, default=threads)
    if rounds:
        made.add_argument("--rounds", type=int, default=rounds, help="each side this many times, in turn")
    if record:
        made.add_argument("--record", action="store_true", help="make the ratios this kind of processor's baselines")
    return made


def peak_mb() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def in_process(name: str, options: Sequence[str], *, threads: int = 0) -> dict[str, Any]:
    """What a benchmark prints last when a process of its own measures with these options."""
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *options]
    environment = dict(os.environ)
    if threads:
        command, environment["OMP_NUM_THREADS"] = [*command, "--threads", str(threads)], str(threads)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr.strip()[-1500:]}")
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def parts(threads: int, *overrides: str, on_gpu: bool = False) -> tuple[Any, Any, Any, list[Any], Any]:
    """Config, base, its chat format, all records and what to multiply in."""
    import torch

    from components.prepare.icd10 import rows as example_rows
    from ray_jobs import entry
    from ray_jobs.base import base_model
    from ray_jobs.kernels import door
    from ray_jobs.text import chat_format
    from tests.doubles.datasets import validate

    entry.quiet_libraries()
    torch.set_num_threads(threads)
    config = config_file.load(DEFAULT_CONFIG, overrides)
    base = base_model.resolve(config.model)
    keyed = sorted((validate(row) for row in example_rows()), key=lambda each: each.key)
    kernels = door.choose(config, base_model.load_config(base.path, config.model), on_gpu=on_gpu)
    return config, base, chat_format.load(base, config.model), [each.record for each in keyed], kernels


def rows(split: Any) -> list[dict[str, list[int]]]:
    """Tokens and labels of each record, as transformers takes them."""
    found = []
    for index in range(len(split)):
        tokens = split.tokens[split.offsets[index] : split.offsets[index + 1]].tolist()
        prompt = int(split.num_prompt_tokens[index])
        found.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    return found
