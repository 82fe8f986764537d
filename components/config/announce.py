"""Notifications of a moved alias, beside the registry's own event log."""

from typing import Annotated

from pydantic import StringConstraints

from components.config.section import Section

Url = Annotated[str, StringConstraints(pattern=r"^(https?://[^\s/?#@]+(/\S*)?)?$")]


class AnnounceConfig(Section):
    """Servers that are notified when an alias moves; none by default. A failed notification does not undo the move.

    Tokens come from the environment. Do not put an address here that is itself a secret: every run stores its config.
    """

    model_registry: Url = ""
    """Address of a Kubeflow Model Registry, such as http://model-registry-service.kubeflow.svc:8080, whose token is
    FINELOOP_MODEL_REGISTRY_TOKEN: the version is registered, and the alias is a property of the model."""
    mlflow: Url = ""
    """Tracking URI of an MLflow server, with MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_USERNAME and _PASSWORD: a run
    with the version's metrics, a version of the registered model, and the alias."""
    webhook: Url = ""
    """URL that receives each move as JSON, signed with FINELOOP_WEBHOOK_SECRET as GitHub signs
    (X-Hub-Signature-256)."""
