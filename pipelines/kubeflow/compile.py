"""The pipelines as YAML for Kubeflow Pipelines, with one config as their default."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any, get_args

import yaml

from components.shared import config_file
from components.shared.config import RunConfig
from components.shared.errors import UserError
from components.shared.methods import MethodName


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
    spec = next(yaml.safe_load_all(body))
    executors = spec["deploymentSpec"]["executors"].values()
    (used,) = {executor["container"]["image"] for executor in executors if "container" in executor}
    digest = hashlib.sha256(body).hexdigest()
    return {"path": str(path), "sha256": digest, "pipeline": spec["pipelineInfo"]["name"], "image": used}


def compile_pipeline(config: RunConfig, *, image: str = "") -> str:
    """The retraining pipeline's YAML, the platform's part as a second document.

    The same config and image give the same text. An empty image means the project's own.
    """
    from pipelines.kubeflow.settle import on_cluster
    from pipelines.retrain import build

    spec, platform = _compiled(build(on_cluster(config)))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    # Not by the compiler's pipeline_parameters: a default of several lines breaks the comment that it writes on top.
    parameters["config"]["defaultValue"] = config_file.dumps(config)
    parameters["config"]["isOptional"] = True
    # kfp compiles no Literal, which the server checks and the UI shows as a list to choose from.
    parameters["method_name"]["literals"] = ["", *get_args(MethodName)]
    if image:
        for executor in spec["deploymentSpec"]["executors"].values():
            if "container" in executor:
                executor["container"]["image"] = image
    return yaml.dump_all([spec, platform], Dumper=_Dumper, sort_keys=True, width=1_000_000)


def _compiled(pipeline: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    from kfp import compiler

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        spec, platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return spec, platform


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such: the config and the steps' source stay readable."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
