"""`fineloop compile` and `fineloop schema`."""

import argparse
import json
from pathlib import Path
from typing import Any

from pipelines.commands.arguments import Answer, add_command, add_config, load_config


def add(commands: Any) -> None:
    """Add both."""
    compile_ = add_command(
        commands,
        "compile",
        _compile,
        does="Write the pipeline as YAML for Kubeflow Pipelines.",
        more="The config becomes the default of its parameter `config`. The same config gives the same bytes.",
        example="fineloop compile -c pipelines/configs/icd10.toml -o retrain.yaml --image REGISTRY/fineloop@sha256:...",
    )
    add_config(compile_)
    compile_.add_argument("-o", "--output", type=Path, default=Path("retrain.yaml"), metavar="FILE", help="where to")
    compile_.add_argument("--image", default="", metavar="IMAGE", help="image of every step, pinned by digest")
    add_command(
        commands,
        "schema",
        _schema,
        does="Print the JSON Schema of the config, for editors.",
        example="fineloop schema > schema.json",
    )


def _compile(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow.compile import write_pipeline

    written = write_pipeline(options.output, load_config(options), image=options.image)
    return Answer(written, f"wrote {written['path']} (sha256 {written['sha256']})")


def _schema(_options: argparse.Namespace) -> Answer:
    from components.shared.config_file import json_schema

    schema = json_schema()
    return Answer(json.loads(schema), schema.rstrip("\n"))
