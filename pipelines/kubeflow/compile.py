"""Compiles the pipelines to YAML for Kubeflow Pipelines, checks what goes into a run of one, and uploads it."""

import difflib
import hashlib
import importlib.metadata
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import kfp_server_api
import yaml
from kfp import dsl, kubernetes

from components.config import config_file
from components.config.methods import MethodName
from components.config.schema import RunConfig
from components.prepare.prepare import ANYWAY, KEYS, overrides
from components.promote.promote import ACTIONS
from components.ray_cluster.rayjob_manifest import CA_FOLDER, CA_VARIABLES, CONFIG_MAP, RAY_SECRET, STAYS, STORE_SECRET
from components.shared.errors import ConfigError, UserError
from components.store.store import PLATFORM_KEYS
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow.client import Kubeflow
from pipelines.step_secrets import of_its_own


def documents(text: str | bytes) -> Iterator[Any]:
    """The documents of some YAML; libyaml, where PyYAML was built with it, takes a tenth of the time."""
    return yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def write_pipeline(path: Path, config: RunConfig, *, pipeline: str = "retrain", image: str = "") -> dict[str, Any]:
    """Write a compiled pipeline, `retrain` or `promotion`, and return {"path", "sha256", "pipeline", "image"}."""
    body = PIPELINES[pipeline](config, image=image).encode()
    try:
        path.write_bytes(body)
    except OSError as exc:
        raise UserError(f"--output {path} cannot be written: {exc.strerror}") from exc
    spec = next(documents(body))
    (used,) = images_of(spec)
    digest = hashlib.sha256(body).hexdigest()
    return {"path": str(path), "sha256": digest, "pipeline": spec["pipelineInfo"]["name"], "image": used}


def compile_pipeline(config: RunConfig, *, image: str = "", default: RunConfig | None = None) -> str:
    """Compile the retraining pipeline to YAML, with the platform spec as a second document; the same arguments give the
    same text.

    The steps' deadlines, labels and certificates, and whether the run tunes, are compiled in. The default of the
    parameter `config` is `default`, else `config` itself. An empty image means the project's own.
    """
    from pipelines.retrain import build

    return _text(
        build(for_cluster(config), tunes=config.tune.when != "never", checks=config.check.when_skipped),
        {"config": config_file.as_table(default or config, given_only=True)},
        {"method_name": ["", *get_args(MethodName)]},  # the empty one keeps the config's method
        image,
    )


def compile_promotion(config: RunConfig, *, image: str = "") -> str:
    """Compile the pipeline that promotes by hand, with the config's adapter, registry and servers as its defaults."""
    from pipelines.promotion import build

    adapter, registry = config.adapter, config.registry
    defaults = {
        "adapter_name": adapter.name,
        "alias": adapter.alias,
        "bucket": registry.bucket,
        "prefix": registry.prefix,
        "trusted_keys": registry.trusted_keys,
        "evaluation_keys": registry.evaluation_keys,
        "announce": config.announce.model_dump(exclude_defaults=True, exclude={"nights"}),
    }
    return _text(build(for_cluster(config)), defaults, {"action": [*ACTIONS]}, image)


PIPELINES: dict[str, Callable[..., str]] = {"retrain": compile_pipeline, "promotion": compile_promotion}


def _text(pipeline: Any, defaults: dict[str, Any], literals: dict[str, list[str]], image: str) -> str:
    from kfp import compiler

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        spec, platform = documents(path.read_text(encoding="utf-8"))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    for name, value in defaults.items():
        parameters[name].update(defaultValue=value, isOptional=True)
    # kfp does not compile Literal types; the server checks `literals`, and the UI shows them as a drop-down list.
    for name, values in literals.items():
        parameters[name]["literals"] = values
    for executor in spec["deploymentSpec"]["executors"].values():
        if image and "container" in executor:
            executor["container"]["image"] = image
    return yaml.dump_all([spec, platform], Dumper=_Dumper, sort_keys=True, width=1_000_000)


def images_of(spec: Mapping[str, Any]) -> set[str]:
    """The images of a pipeline's steps; the importer has none."""
    executors = spec.get("deploymentSpec", {}).get("executors", {}).values()
    return {executor["container"]["image"] for executor in executors if "container" in executor}


class _Dumper(yaml.SafeDumper):
    """YAML dumper that writes multi-line strings as literal blocks, so that the steps' source stays readable."""

    def represent_scalar(self, tag: str, value: Any, style: str | None = None) -> yaml.ScalarNode:
        return super().represent_scalar(tag, value, "|" if "\n" in str(value) else style)


# Settings of a step that apply only on a cluster: deadline, memory, retries, labels, environment by reference.

ENVIRONMENT = (
    *("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "RAY_ADDRESS", "RAY_AUTH_MODE"),
    *("FINELOOP_USER", "OPENLINEAGE_URL", "HTTPS_PROXY", "NO_PROXY"),
    *PLATFORM_KEYS.values(),
)
STEP_S = 3600
GRACE_S = 900
RETRIES = 2
"""Retries of each step. A retry finds what the first attempt left: a Ray job, a folder, an alias."""


def for_cluster(config: RunConfig) -> Callable[[dsl.PipelineTask], None]:
    """Return a function that configures each task of a pipeline for this config."""

    def configure(task: dsl.PipelineTask) -> None:
        name = task.component_spec.name
        reads_here = name == "newer" or (name == "prepare" and config.data.engine == "local")
        deadline_s = config.ray.timeout_s if reads_here else STEP_S
        if name in ("tune", "finetune", "evaluate", "check") or (name == "prepare" and not reads_here):
            # It waits for a Ray job, in a queue too, and a little longer, so that the job can say why it ended.
            deadline_s = config.ray.patience_s + GRACE_S
            for annotation, value in STAYS.items():
                kubernetes.add_pod_annotation(task, annotation, value)
        kubernetes.set_timeout(task, deadline_s)
        # Argo counts backoff_max_duration from the start of the first attempt, and when it is over ends even an attempt
        # that is running. kfp's default of an hour would end a training.
        at_most_s = (RETRIES + 1) * (deadline_s + GRACE_S)
        task.set_retry(RETRIES, backoff_duration="30s", backoff_factor=2, backoff_max_duration=f"{at_most_s}s")
        # Only the first step reads the data, and data.memory_gib excludes what a record adds.
        task.set_cpu_request("500m").set_cpu_limit("2")
        limit_gib = math.ceil(4 * config.data.memory_gib) if reads_here else 2
        task.set_memory_request("1Gi").set_memory_limit(f"{limit_gib}Gi")
        kubernetes.set_security_context(task, run_as_user=1000, run_as_group=1000, run_as_non_root=True)
        kubernetes.use_config_map_as_env(task, CONFIG_MAP, {key: key for key in ENVIRONMENT}, optional=True)
        credentials = {key: key for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        kubernetes.use_secret_as_env(task, STORE_SECRET, credentials, optional=True)
        kubernetes.use_secret_as_env(task, RAY_SECRET, {"auth_token": "RAY_AUTH_TOKEN"}, optional=True)
        for label, value in config.ray.cluster.pod_labels.items():
            kubernetes.add_pod_label(task, label, value)
        if bundle := config.ray.cluster.ca_bundle:
            kubernetes.use_config_map_as_volume(task, bundle, CA_FOLDER)
            for variable, path in CA_VARIABLES.items():
                task.set_env_variable(variable, path)
        own = of_its_own().get(name)
        for secret, names in own.kubernetes.items() if own else ():
            kubernetes.use_secret_as_env(task, secret, {key: key for key in names}, optional=True)

    return configure


# The parameters of a run, checked against the compiled pipeline before anything is sent.

CONFIG = "config"
KINDS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "NUMBER_INTEGER": ("a whole number", int),
    "NUMBER_DOUBLE": ("a number", (int, float)),
    "BOOLEAN": ("true or false", bool),
    "LIST": ("a JSON list", list),
    "STRUCT": ("a JSON object", dict),
}


def defined(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pipeline's parameters by name, as its spec defines them."""
    parameters: dict[str, dict[str, Any]] = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    return parameters


def resolve_parameters(
    spec: Mapping[str, Any], config: RunConfig, changes: Sequence[str], *, kept: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the parameters to send: the config, and each NAME=VALUE of `changes` in the type that the pipeline wants.

    `kept` has earlier values, which stay unless the pipeline has no such parameter any more, or `config` or `changes`
    replaces them. Raises UserError: a name is unknown, or a value does not have the parameter's type; the server checks
    the rest.
    """
    parameters = defined(spec)
    values = {name: value for name, value in (kept or {}).items() if name in parameters}
    if CONFIG in parameters:
        values[CONFIG] = config_file.as_table(config)
    for argument in changes:
        name, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"--param {argument}: expected NAME=VALUE")
        if name == CONFIG:
            raise UserError("--param config: the config comes from -c FILE and --set KEY=VALUE")
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted({*parameters} - {CONFIG}))}"
            raise UserError(f"--param {name}: the pipeline has no such parameter; {hint}")
        values[name] = _typed(name, text, parameters[name])
    return values


def _typed(name: str, text: str, parameter: Mapping[str, Any]) -> Any:
    kind = parameter["parameterType"]
    value: Any = text
    if kind != "STRING":
        expected, types = KINDS[kind]
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "BOOLEAN"):
            raise UserError(f"--param {name}={text}: expected {expected}")
    return value


# The pods of a run must be able to read its data and base, which must not be on the submitter's disk.


def check_reach(config: RunConfig, parameters: Mapping[str, Any]) -> None:
    """Refuse a config that names a local path, or a parameter that replaces a key by one. Raises UserError:
    `data.source`, `data.feedback`, `model.base`, or the parameter that replaces it is a local path."""
    named = {"data.source": config.data.source, "data.feedback": config.data.feedback}
    if replaced := parameters.get("data_source"):
        named["--param data_source"] = str(replaced)
        del named["data.source"]
    for field, sources in named.items():
        for source in [sources] if isinstance(sources, str) else sources:
            if "://" not in source or source.startswith("file://"):
                raise UserError(
                    f"{field} is {source!r}, a path, and no pod reads this machine's disk: put the data in S3 and give "
                    "s3://BUCKET/FOLDER/, or take the built-in example://icd10"
                )
    field, base = "model.base", config.model.base
    if replaced := parameters.get("base_model"):
        field, base = "--param base_model", str(replaced)
    # What cannot be a hub id, or looks like one but exists here, is a path.
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base) and not Path(base).exists()
    if base.startswith("file://") or not ("://" in base or is_hub_id):
        raise UserError(
            f"{field} is {base!r}, a path, and no pod reads this machine's disk: put the folder in S3 and give "
            "s3://BUCKET/FOLDER, or name a hub id or pkg://PACKAGE/FILE.gguf"
        )


@dataclass(frozen=True)
class GivenConfig:
    """The config of a run, or of each run of a schedule, and the parameters that replace keys of it; `table` is empty
    for a run of another pipeline."""

    table: Mapping[str, Any]
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, detail: Any, spec: Mapping[str, Any]) -> "GivenConfig":
        """Read the config that was sent, or else the default in the pipeline's spec; an empty spec has no default."""
        default = defined(spec).get(CONFIG, {}).get("defaultValue") if spec else None
        parameters = sent(detail)
        fields = {name: parameters[name] for name in (*KEYS, ANYWAY) if name in parameters}
        table = config_file.whole_numbers(parameters.get(CONFIG) or default)
        return cls(dict(table) if isinstance(table, Mapping) else {}, fields)

    @property
    def adapter(self) -> str:
        """Name of the adapter to retrain; empty if the config has none."""
        section = self.table.get("adapter")
        name = section.get("name", "") if isinstance(section, Mapping) else ""
        return str(name and (self.fields.get("adapter_name") or name))

    @property
    def digest(self) -> str:
        """The config's digest, as in lineage; empty if this version of Fineloop cannot read the config."""
        if not self.table:
            return ""
        try:
            return config_file.validate(self.table, [*overrides(**self.fields).values()]).digest
        except ConfigError:
            return ""


def sent(detail: Any) -> dict[str, Any]:
    """Return the parameters of a run, or of each run of a recurring run, as they were sent."""
    return dict(detail.runtime_config.parameters or {}) if detail.runtime_config else {}


# A compiled pipeline, and its versions on the server: one for each content. Of the config it holds only the steps' time
# limits, labels and certificates.

PIPELINE = "fineloop-retrain"


@dataclass(frozen=True)
class Package:
    """The pipeline as YAML, and the config to run it with."""

    config: RunConfig
    text: str

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The pipeline's part of the YAML; the platform's, if any, is a second document."""
        return dict(next(iter(documents(self.text))))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def make_package(config: RunConfig, *, image: str = "") -> Package:
    """Compile the pipeline, with the example config as its default; an empty image means the project's image."""
    return Package(config, compile_pipeline(config, image=image, default=config_file.load(DEFAULT_CONFIG)))


def publish(kubeflow: Kubeflow, package: Package) -> dict[str, str]:
    """Upload the package unless the server has the same content already; returns `pipeline_id` and `version_id`.

    A version is named by release and content, so that who uploads the same at the same time finds it by its name.
    """
    client, namespace = kubeflow.client, kubeflow.namespace or None
    # Without a version: an upload would name the first one after the pipeline.
    described = kfp_server_api.V2beta1Pipeline(
        display_name=PIPELINE,
        name=PIPELINE,
        description=package.spec["pipelineInfo"].get("description", ""),
        namespace=namespace,
    )
    pipeline_id = _found_or_made(
        lambda: kubeflow.id_of("pipeline", PIPELINE, client.list_pipelines, namespace=namespace),
        lambda: client.pipelines.pipeline_service_create_pipeline(described).pipeline_id,
        kubeflow.asking("create the pipeline"),
    )
    name = f"{importlib.metadata.version('fineloop')}-{package.sha256[:12]}"
    about = {"pipeline_id": pipeline_id, "description": f"sha256 {package.sha256}"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(package.text)
        file.flush()
        version_id = _found_or_made(
            lambda: kubeflow.id_of("pipeline_version", name, client.list_pipeline_versions, pipeline_id=pipeline_id),
            lambda: client.upload_pipeline_version(file.name, name, **about).pipeline_version_id,
            kubeflow.asking("upload the pipeline"),
        )
    return {"pipeline_id": pipeline_id, "version_id": version_id}


def _found_or_made(find: Callable[[], str], make: Callable[[], str], asking: AbstractContextManager[None]) -> str:
    """The id that `find` finds, before or, as another client may make the same, after `make` makes it."""
    if existing := find():
        return existing
    with asking:
        try:
            return make()
        except kfp_server_api.ApiException as exc:
            if exc.status != 409 or not (existing := find()):
                raise
            return existing
