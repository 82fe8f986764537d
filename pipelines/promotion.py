"""The pipeline that a person starts from the UI: put one version into production, or go back to an earlier one."""

from typing import Any

from kfp import dsl

from components.promote.component import move_by_hand
from pipelines.retrain import Configure

NAME = "fineloop-promotion"


def build(configure: Configure = lambda task: None) -> dsl.base_component.BaseComponent:
    """Build the pipeline; `configure` is as in `retrain.build`."""

    @dsl.pipeline(name=NAME, description="Promote or approve a published version of an adapter by hand, or roll back.")
    def promotion(
        adapter_name: str,
        action: str = "promote",
        version: str = "",
        alias: str = "production",
        reason: str = "",
        person: str = "",
        bucket: str = "fineloop",
        prefix: str = "",
        trusted_keys: list[str] = [],  # noqa: B006 - kfp reads it as the field's default
        evaluation_keys: list[str] = [],  # noqa: B006 - likewise
        announce: dict[str, Any] = {},  # noqa: B006 - likewise
    ) -> None:
        """Move an alias by hand; the event log keeps who and why.

        Args:
            adapter_name: adapter to move the alias of.
            action: promote; approve, where the gate left it to a person; or roll back.
            version: the version to point at; empty takes the newest one, or when rolling back the one before.
            alias: the pointer to move.
            reason: why, for the event log; needed to approve, and to override the gate.
            person: who asked, for the event log; needed likewise.
            bucket: the registry's bucket.
            prefix: its folder in the bucket.
            trusted_keys: public keys; where there are any, one of them must have signed the version.
            evaluation_keys: public keys; where keys are trusted, one of them must have signed what is approved.
            announce: the config's section announce: servers to notify.
        """
        moved = move_by_hand(
            adapter_name=adapter_name,
            action=action,
            version=version,
            alias=alias,
            reason=reason,
            person=person,
            bucket=bucket,
            prefix=prefix,
            trusted_keys=trusted_keys,
            evaluation_keys=evaluation_keys,
            announce=announce,
            job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        )
        moved.set_display_name("Move the alias")
        moved.set_caching_options(False)
        configure(moved)

    return promotion


promotion = build()
