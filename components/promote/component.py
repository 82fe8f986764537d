"""Kubeflow steps: the ends of a run, and the one step of a promotion by hand."""

from typing import Any

from kfp import dsl
from kfp.dsl import Markdown, Output

from components.step.step import COMPONENT


@dsl.component(**COMPONENT)
def promote(run_uri: str, config_digest: str, dataset_uri: str, dataset_sha256: str, decision_sha256: str) -> str:
    """Point the alias at the candidate of the gate's decision, known by its sha256, and return the event's URI."""
    from components.promote.promote import carry_out_decision
    from components.step.step import step

    with step("promote", run_uri, config_digest, dataset_uri, dataset_sha256) as step_run:
        event_uri = carry_out_decision(step_run, decision_sha256)
    return event_uri


@dsl.component(**COMPONENT)
def hold(run_uri: str, config_digest: str) -> str:
    """Leave the alias where it is and return the decision's URI."""
    from components.promote.promote import hold as leave_alias
    from components.step.step import step

    with step("hold", run_uri, config_digest) as step_run:
        decision_uri = leave_alias(step_run)
    return decision_uri


@dsl.component(**COMPONENT)
def skip(run_uri: str, config_digest: str) -> str:
    """Train nothing, because there is too little new, and return the decision's URI."""
    from components.promote.promote import skip as leave_everything
    from components.step.step import step

    with step("skip", run_uri, config_digest) as step_run:
        decision_uri = leave_everything(step_run)
    return decision_uri


@dsl.component(**COMPONENT)
def roll_back(run_uri: str, config_digest: str, version: str, reason: str) -> str:
    """Take the alias from the version that a look found to be worse, and return the event's URI."""
    from components.promote.promote import roll_back_worse
    from components.step.step import step

    with step("roll-back", run_uri, config_digest) as step_run:
        event_uri = roll_back_worse(step_run, version, reason)
    return event_uri


@dsl.component(**COMPONENT)
def move_by_hand(
    adapter_name: str,
    action: str,
    version: str,
    alias: str,
    reason: str,
    person: str,
    bucket: str,
    prefix: str,
    trusted_keys: list[str],
    evaluation_keys: list[str],
    announce: dict[str, Any],
    job_id: str,
    summary: Output[Markdown],
) -> str:
    """Promote or roll back because a person asked for it, and return the event's URI."""
    import os
    from pathlib import Path

    from components.config.schema import AnnounceConfig, RegistryConfig
    from components.handover.announce import announce as notify
    from components.promote.promote import Person, as_markdown, carry_out
    from components.registry.cache import forget
    from components.store.store import Store

    others, by = AnnounceConfig.model_validate(announce), Person(person, reason, otherwise="Kubeflow UI")
    keys = {"trusted_keys": trusted_keys, "evaluation_keys": evaluation_keys}
    store = Store.open(RegistryConfig(bucket=bucket, prefix=prefix, **keys))
    store.check()
    event = carry_out(store, adapter_name, action, by, alias=alias, version=version, run_id=job_id)
    Path(summary.path).write_text(as_markdown(store, adapter_name, event), encoding="utf-8")
    forget(store, adapter_name)
    notify(others, store, adapter_name, event, os.environ)
    return event.uri
