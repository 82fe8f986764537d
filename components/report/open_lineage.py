"""Sends a run's start and end as OpenLineage events (openlineage.io, spec 2-0-2), with their inputs and outputs.

OpenLineage's own client sends them to the address in its variables: OPENLINEAGE_URL and OPENLINEAGE_API_KEY, or the
file that OPENLINEAGE_CONFIG names. Both are sent when the run has ended, because only then its version's inputs are
known.
"""

import logging
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from components.config.schema import RunConfig
from components.records import runs
from components.registry.identity import version_key
from components.registry.lineage import Ancestor, of_record
from components.report.run_files import RunFiles
from components.store.store import Store

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

logger = logging.getLogger(__name__)

CONFIGURED_BY = ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG")
NAMESPACE = "fineloop"
PRODUCER = "urn:fineloop"


def emit(config: RunConfig, store: Store, run: RunFiles) -> None:
    """Send the events of the run, if a server is configured; log a warning if that fails."""
    if not any(os.environ.get(name) for name in CONFIGURED_BY):
        return
    try:
        from openlineage.client import OpenLineageClient

        # Else the client would add the git remote of the folder that it runs in, password included.
        client = OpenLineageClient(config={"facets": {"source_code_location": {"disabled": True}}})
        for event in events_of(config, store, run):
            client.emit(event)
        client.close()
    except ImportError as exc:
        logger.warning(
            "OpenLineage does not get the events of this run: install Fineloop with its extra openlineage (%s)", exc
        )
    except (OSError, ValueError, TypeError) as exc:  # requests raises OSErrors
        logger.warning("OpenLineage did not get the events of this run: %s", exc)


def events_of(config: RunConfig, store: Store, run: RunFiles) -> list["RunEvent"]:
    """The START event with the inputs that the config names, and the FAIL or COMPLETE event with what the version was
    made from, as far as the run got."""
    from openlineage.client.event_v2 import RunState

    began_at = min((step.started_at for step in run.steps), default=run.generated_at.isoformat())
    sources = [config.data.source] if isinstance(config.data.source, str) else config.data.source
    asked_for = [*(Ancestor("source", each) for each in sources), Ancestor("base", config.model.base)]
    failed = [step for step in run.steps if not step.succeeded]
    error = "; ".join(f"{step.step}: {step.result.get('error', {}).get('message', 'failed')}" for step in failed)
    made_from = of_record(run.lineage) if run.lineage else asked_for
    version = run.version if run.lineage else None
    end = RunState.FAIL if error else RunState.COMPLETE
    return [
        _event(config, store, run, RunState.START, began_at, asked_for),
        _event(config, store, run, end, run.generated_at.isoformat(), made_from, version=version, error=error),
    ]


def _event(
    config: RunConfig,
    store: Store,
    run: RunFiles,
    state: Any,
    at: str,
    made_from: Iterable[Ancestor],
    *,
    version: str | None = None,
    error: str = "",
) -> "RunEvent":
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent
    from openlineage.client.facet_v2 import dataset_version_dataset, error_message_run, job_type_job

    outputs = []
    if version:
        namespace, name = _named(store.uri(version_key(config.adapter.name, version)))
        facets = {"version": dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=version)}
        outputs = [OutputDataset(namespace=namespace, name=name, facets=facets)]
    inputs = dict.fromkeys(place for each in made_from if (place := _place(store, each)))
    job_type = job_type_job.JobTypeJobFacet(processingType="BATCH", integration="FINELOOP", jobType="PIPELINE")
    failed = error_message_run.ErrorMessageRunFacet(message=error, programmingLanguage="python")
    return RunEvent(
        eventTime=at,
        producer=PRODUCER,
        eventType=state,
        run=Run(runId=run_uuid(store, run.run_id), facets={"errorMessage": failed} if error else {}),
        job=Job(namespace=NAMESPACE, name=config.adapter.name, facets={"jobType": job_type}),
        inputs=[InputDataset(namespace=namespace, name=name) for namespace, name in inputs],
        outputs=outputs,
    )


def run_uuid(store: Store, run_id: str) -> str:
    """The run's id if it is a UUID, as Kubeflow's are; else a UUID made from its address."""
    try:
        return str(uuid.UUID(run_id))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, store.uri(runs.run_key(run_id))))


def _place(store: Store, ancestor: Ancestor) -> tuple[str, str] | None:
    """The namespace and name of a dataset; None for an ancestor that is no dataset, such as a commit."""
    match ancestor.kind:
        case "dataset":
            return _named(store.uri(f"datasets/{ancestor.name}"))
        case "source" | "base" | "parent":
            return _named(ancestor.name)
    return None


def _named(reference: str) -> tuple[str, str]:
    """The namespace and name by OpenLineage's rules (openlineage.io/docs/spec/naming); other names go into ours."""
    parts = urlsplit(reference)
    if parts.scheme in ("s3", "gs"):
        return f"{parts.scheme}://{parts.netloc}", parts.path.strip("/") or "/"
    if reference.startswith(("/", "./", "../")):
        return "file", str(Path(reference).absolute())
    return NAMESPACE, reference
