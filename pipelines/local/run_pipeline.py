"""The process that `fineloop run` and `fineloop train` start: the pipeline under kfp.local, or three of its steps."""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType


def main(arguments: list[str]) -> int:
    """Run to the end. On SIGTERM every step is told to end as well, for kfp.local does not tell them."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.local.run_pipeline")
    parser.add_argument("what", choices=("retrain", "train"))
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--pipeline-root", type=Path, required=True)
    options = parser.parse_args(arguments)

    config_toml = options.config.read_text(encoding="utf-8")
    if options.what == "retrain":
        signal.signal(signal.SIGTERM, _end_the_group)
        retrain(config_toml, options.run_id, pipeline_root=options.pipeline_root)
    else:
        train(config_toml, options.run_id)
    return 0


def retrain(config_toml: str, run_id: str, *, pipeline_root: Path) -> None:
    """The whole pipeline; each step is a process of its own."""
    from kfp import local

    from pipelines.retrain import retrain as pipeline

    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(pipeline_root))
    pipeline(config=config_toml, run_id=run_id)


def train(config_toml: str, run_id: str) -> None:
    """Prepare, fine-tune and evaluate: a version without an alias."""
    from components.evaluate.evaluate import evaluate
    from components.finetune.finetune import finetune
    from components.prepare.prepare import prepare
    from components.step.step import step

    with step("prepare", config_toml, run_id) as run:
        dataset = prepare(run.config, run.store)
        run.result.update(vars(dataset))
        run.say(dataset.told)
    with step("finetune", config_toml, run_id) as run:
        version_uri = finetune(run, dataset_uri=dataset.uri)
    with step("evaluate", config_toml, run_id) as run:
        evaluate(run, dataset_uri=dataset.uri, version_uri=version_uri)


def _end_the_group(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    os.killpg(os.getpgrp(), number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
