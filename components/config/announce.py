"""Whom a move of an alias is told to, beside the registry's own event log."""

from typing import Annotated

from pydantic import StringConstraints

from components.config.section import Section

Url = Annotated[str, StringConstraints(pattern=r"^(https?://[^\s/?#@]+(/\S*)?)?$")]


class AnnounceConfig(Section):
    """Whom each move of an alias is announced to; nobody by default. A move stands whether they can be told or not.

    Tokens come from the environment. An address that is a secret itself does not belong here: every run keeps its
    config.
    """

    model_registry: Url = ""
    """Address of a Kubeflow Model Registry, such as http://model-registry-service.kubeflow.svc:8080, whose token is
    FINELOOP_MODEL_REGISTRY_TOKEN: the version is registered, and the alias is a property of the model."""
    mlflow: Url = ""
    """Tracking URI of an MLflow server, with MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_USERNAME and _PASSWORD: a run
    with the version's metrics, a version of the registered model, and the alias."""
    webhook: Url = ""
    """Where the move is posted to as JSON, signed with FINELOOP_WEBHOOK_SECRET as GitHub does (X-Hub-Signature-256)."""
