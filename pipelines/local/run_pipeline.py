"""The process that `fineloop run` and `fineloop train` start: a pipeline under kfp.local, a process for each step."""

import argparse
import os
import signal
import sys
import tomllib
from pathlib import Path
from types import FrameType
from typing import Any

from components.shared import garbage
from components.step.step import INTERRUPTED, first_step
from pipelines.step_secrets import of_step, without_secrets


def main(arguments: list[str]) -> int:
    """Run the pipeline to its end. SIGTERM is passed on to every step, which kfp.local does not do. Each step inherits
    this process's environment without the secrets, and is given only its own secrets."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.local.run_pipeline")
    parser.add_argument("what", choices=("retrain", "train", "sweep", "check"))
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--pipeline-root", type=Path, required=True)
    parser.add_argument("--dataset", default="", help="of a training: s3:// address of what it trains on")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _end_the_group)
    garbage.leave_at_exit()
    secrets = dict(os.environ.items() - without_secrets(os.environ).items())
    for name in secrets:
        del os.environ[name]

    def configure(task: Any) -> None:
        for name, value in of_step(task.component_spec.name, secrets).items():
            task.set_env_variable(name, value)

    with garbage.importing():
        from kfp import local

        from pipelines.retrain import build, build_check, build_train, build_train_on, sweep

    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(options.pipeline_root))
    config = tomllib.loads(options.config.read_text(encoding="utf-8"))
    if options.dataset:
        with first_step("prepare", config, options.run_id) as begun:
            begun.say(f"taking {options.dataset} as it is")
        build_train_on(options.dataset)(run_uri=begun.run_uri, config_digest=begun.config.digest)
        return 0
    if options.what == "check":
        with first_step("begin", config, options.run_id) as begun:
            begun.say("nothing is trained")
        build_check(configure)(run_uri=begun.run_uri, config_digest=begun.config.digest)
        return 0
    tunes = config["tune"]["when"] != "never"  # the resolved config has every key
    pipelines = {
        "retrain": lambda: build(configure, tunes=tunes, checks=config["check"]["when_skipped"]),
        "train": lambda: build_train(tunes=tunes),
        "sweep": lambda: sweep,
    }
    pipelines[options.what]()(config=config, run_id=options.run_id)
    return 0


def _end_the_group(number: int, _frame: FrameType | None) -> None:
    os.environ[INTERRUPTED] = "1"  # for the report, which kfp.local starts as after a step that failed
    signal.signal(number, signal.SIG_IGN)
    os.killpg(os.getpgrp(), number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
