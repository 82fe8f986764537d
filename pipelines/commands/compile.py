"""`fineloop compile`."""

import argparse
from pathlib import Path
from typing import Any

from pipelines.commands.arguments import Answer, add_command, add_config, load_config


def add(commands: Any) -> None:
    """Add the command."""
    compile_ = add_command(
        commands,
        "compile",
        _compile,
        does="Write a pipeline as YAML for Kubeflow Pipelines.",
        more="`retrain` is the whole run, with the config as the default of its parameter `config`; `promotion` is for "
        "people who promote or roll back from the UI. The same config gives the same bytes.",
        example="fineloop compile -c pipelines/configs/icd10.toml -o retrain.yaml --image REGISTRY/fineloop@sha256:...",
    )
    add_config(compile_)
    compile_.add_argument("--pipeline", choices=("retrain", "promotion"), default="retrain", help="default: retrain")
    compile_.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: PIPELINE.yaml)")
    compile_.add_argument("--image", default="", metavar="IMAGE", help="image of every step, pinned by digest")


def _compile(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow.compile import write_pipeline

    path = options.output or Path(f"{options.pipeline}.yaml")
    written = write_pipeline(path, load_config(options), pipeline=options.pipeline, image=options.image)
    return Answer(written, f"wrote {written['path']} (sha256 {written['sha256']})")
