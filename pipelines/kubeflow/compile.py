"""Compiles the pipelines to YAML for Kubeflow Pipelines, with one config as their default."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml

from components.config import config_file
from components.config.methods import MethodName
from components.config.schema import RunConfig
from components.promote.by_hand import ACTIONS
from components.shared.errors import UserError

METHOD_NAMES = ["", *get_args(MethodName)]
"""Choices of the parameter `method_name` in the UI; the empty one keeps the config's method."""


def write_pipeline(path: Path, config: RunConfig, *, pipeline: str = "retrain", image: str = "") -> dict[str, Any]:
    """Write a compiled pipeline, `retrain` or `promotion`, and return {"path", "sha256", "pipeline", "image"}.

    Raises:
        UserError: the file cannot be written.
    """
    body = PIPELINES[pipeline](config, image=image).encode()
    try:
        path.write_bytes(body)
    except OSError as exc:
        raise UserError(f"--output {path} cannot be written: {exc.strerror}") from exc
    spec = next(yaml.safe_load_all(body))
    (used,) = {container["image"] for container in _containers(spec)}
    digest = hashlib.sha256(body).hexdigest()
    return {"path": str(path), "sha256": digest, "pipeline": spec["pipelineInfo"]["name"], "image": used}


def compile_pipeline(config: RunConfig, *, image: str = "", default: RunConfig | None = None) -> str:
    """Compile the retraining pipeline to YAML, with the platform spec as a second document.

    The steps' deadlines, labels and certificates, and whether the run tunes, are compiled in. The default of the
    parameter `config` is `default`, or `config` itself if `default` is None. The same arguments give the same text. An
    empty image means the project's own.
    """
    from pipelines.kubeflow.task_settings import for_cluster
    from pipelines.retrain import build

    return _text(
        build(for_cluster(config), tunes=config.tune.when != "never"),
        {"config": config_file.as_table(default or config, given_only=True)},
        {"method_name": METHOD_NAMES},
        image,
    )


def compile_promotion(config: RunConfig, *, image: str = "") -> str:
    """Compile the pipeline that promotes by hand, with the config's adapter, registry and servers as its defaults."""
    from pipelines.kubeflow.task_settings import for_cluster
    from pipelines.promotion import build

    adapter, registry = config.adapter, config.registry
    defaults = {
        "adapter_name": adapter.name,
        "alias": adapter.alias,
        "bucket": registry.bucket,
        "prefix": registry.prefix,
        "trusted_keys": registry.trusted_keys,
        "evaluation_keys": registry.evaluation_keys,
        "announce": config.announce.model_dump(mode="json", exclude_defaults=True),
    }
    return _text(build(for_cluster(config)), defaults, {"action": [*ACTIONS]}, image)


PIPELINES: dict[str, Callable[..., str]] = {"retrain": compile_pipeline, "promotion": compile_promotion}


def _text(pipeline: Any, defaults: dict[str, Any], literals: dict[str, list[str]], image: str) -> str:
    spec, platform = _compiled(pipeline)
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    for name, value in defaults.items():
        parameters[name].update(defaultValue=value, isOptional=True)
    # kfp does not compile Literal types; the server checks `literals`, and the UI shows them as a drop-down list.
    for name, values in literals.items():
        parameters[name]["literals"] = values
    if image:
        for container in _containers(spec):
            container["image"] = image
    return yaml.dump_all([spec, platform], Dumper=_Dumper, sort_keys=True, width=1_000_000)


def _containers(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return every step's container; the importer has none."""
    return (each["container"] for each in spec["deploymentSpec"]["executors"].values() if "container" in each)


def _compiled(pipeline: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    from kfp import compiler

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        spec, platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return spec, platform


class _Dumper(yaml.SafeDumper):
    """YAML dumper that writes multi-line strings as literal blocks, so that the steps' source stays readable."""


def _scalar(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _scalar)
