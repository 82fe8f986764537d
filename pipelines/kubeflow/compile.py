"""The pipeline as YAML for Kubeflow Pipelines, with one config as its default."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import yaml

from components.shared import config_file
from components.shared.config import RunConfig
from components.shared.errors import UserError


def write_pipeline(path: Path, config: RunConfig, *, image: str = "") -> dict[str, Any]:
    """Write the compiled pipeline and return {"path", "sha256", "pipeline", "image"}.

    Raises:
        UserError: the file cannot be written.
    """
    body = compile_pipeline(config, image=image).encode()
    try:
        path.write_bytes(body)
    except OSError as exc:
        raise UserError(f"--output {path} cannot be written: {exc.strerror}") from exc
    spec = yaml.safe_load(body)
    images = {executor["container"]["image"] for executor in spec["deploymentSpec"]["executors"].values()}
    (used,) = images
    digest = hashlib.sha256(body).hexdigest()
    return {"path": str(path), "sha256": digest, "pipeline": spec["pipelineInfo"]["name"], "image": used}


def compile_pipeline(config: RunConfig, *, image: str = "") -> str:
    """The pipeline's YAML: the same config and image give the same text. An empty image means the project's own."""
    from kfp import compiler

    from pipelines.retrain import retrain

    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(retrain, str(compiled))
        spec = yaml.safe_load(compiled.read_text(encoding="utf-8"))
    # Not by the compiler's pipeline_parameters: a default of several lines breaks the comment that it writes on top.
    spec["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"] = config_file.dumps(config)
    if image:
        for executor in spec["deploymentSpec"]["executors"].values():
            executor["container"]["image"] = image
    return yaml.dump(spec, Dumper=_Dumper, sort_keys=True, width=1_000_000)


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such: the config and the steps' source stay readable."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
