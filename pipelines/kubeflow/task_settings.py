"""Settings of a step that apply only on a cluster: deadline, memory, retries, labels, environment by reference."""

import math
from collections.abc import Callable

from kfp import dsl, kubernetes

from components.config.schema import RunConfig
from components.promote import announce
from components.ray_cluster.rayjob_manifest import (
    CA_FOLDER,
    CA_VARIABLES,
    CONFIG_MAP,
    RAY_SECRET,
    STAYS,
    STORE_SECRET,
)
from components.registry import signing

ENVIRONMENT = (
    *("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "RAY_ADDRESS", "RAY_AUTH_MODE"),
    *("FINELOOP_USER", "OPENLINEAGE_URL", "HTTPS_PROXY", "NO_PROXY"),
)
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
PROMOTE_SECRET = "fineloop-promote"
REPORT_SECRET = "fineloop-report"
EVALUATE_SECRET = "fineloop-evaluate"
ON_RAY = frozenset({"tune", "finetune", "evaluate"})
"""Steps that wait for a Ray job, its time in a queue included. Their deadline is longer than the job's, so that the job
can report why it ended. So does prepare if data.engine is ray."""
STEP_S = 3600
GRACE_S = 900
DATA_HEADROOM = 4
"""Memory limit of the step that reads the data, in multiples of data.memory_gib, which excludes what a record adds."""
RETRIES = 2
"""Retries of each step. A retry finds what the first attempt left: a Ray job, a folder, an alias."""


def for_cluster(config: RunConfig) -> Callable[[dsl.PipelineTask], None]:
    """Return a function that configures each task of a pipeline for this config."""

    def configure(task: dsl.PipelineTask) -> None:
        name = task.component_spec.name
        reads_here = name == "prepare" and config.data.engine == "local"
        on_ray = name in ON_RAY or (name == "prepare" and not reads_here)
        deadline_s = config.data.timeout_s if reads_here else STEP_S
        if on_ray:
            ray = config.ray.for_data(timeout_s=config.data.timeout_s) if name == "prepare" else config.ray
            deadline_s = ray.patience_s + GRACE_S
        kubernetes.set_timeout(task, deadline_s)
        if on_ray:
            for annotation, value in STAYS.items():
                kubernetes.add_pod_annotation(task, annotation, value)
        # Argo counts backoff_max_duration from the start of the first attempt, and when it is over ends even an attempt
        # that is running. kfp's default of an hour would end a training.
        at_most_s = (RETRIES + 1) * (deadline_s + GRACE_S)
        task.set_retry(RETRIES, backoff_duration="30s", backoff_factor=2, backoff_max_duration=f"{at_most_s}s")
        # The first step reads the data; the others hold a few JSON objects.
        task.set_cpu_request("500m").set_cpu_limit("2")
        limit_gib = math.ceil(DATA_HEADROOM * config.data.memory_gib) if reads_here else 2
        task.set_memory_request("1Gi").set_memory_limit(f"{limit_gib}Gi")
        kubernetes.set_security_context(task, run_as_user=1000, run_as_group=1000, run_as_non_root=True)
        kubernetes.use_config_map_as_env(task, CONFIG_MAP, {key: key for key in ENVIRONMENT}, optional=True)
        kubernetes.use_secret_as_env(task, STORE_SECRET, {key: key for key in CREDENTIALS}, optional=True)
        kubernetes.use_secret_as_env(task, RAY_SECRET, {"auth_token": "RAY_AUTH_TOKEN"}, optional=True)
        for label, value in config.ray.cluster.labels.items():
            kubernetes.add_pod_label(task, label, value)
        if bundle := config.ray.cluster.ca_bundle:
            kubernetes.use_config_map_as_volume(task, bundle, CA_FOLDER)
            for variable, path in CA_VARIABLES.items():
                task.set_env_variable(variable, path)
        if name in ("promote", "move-by-hand"):  # they sign the move and announce it
            keys = (signing.KEY_VARIABLE, signing.SIGNER_VARIABLE, *announce.secrets())
            kubernetes.use_secret_as_env(task, PROMOTE_SECRET, {key: key for key in keys}, optional=True)
        if name == "evaluate":  # it signs what was measured
            own = {key: key for key in ("FINELOOP_EVALUATION_KEY", "FINELOOP_EVALUATION_SIGNER")}
            kubernetes.use_secret_as_env(task, EVALUATE_SECRET, own, optional=True)
        if name == "report":  # it sends events to an OpenLineage server
            key = "OPENLINEAGE_API_KEY"
            kubernetes.use_secret_as_env(task, REPORT_SECRET, {key: key}, optional=True)

    return configure
