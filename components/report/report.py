"""The report step: reads what the run left in the store and writes runs/<run_id>/report.html."""

import logging
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from markupsafe import Markup

from components.config import config_file
from components.config.schema import RunConfig
from components.records import runs
from components.records.runs import Replayed
from components.records.steps import Decision, Evaluation
from components.records.sweep import SweepResult, TunedRate
from components.registry.identity import version_key
from components.registry.lineage import Ancestor, of_record
from components.registry.versions import LINEAGE
from components.report import charts, comparison, sections
from components.report.adapter_files import AdapterFiles
from components.report.html import count, moment, sure_once, template
from components.report.night import told
from components.report.registry_page import write_pages
from components.report.run_files import RunFiles, by_class, wrong_answers
from components.shared.errors import FineloopError
from components.shared.metrics import metric_of, metrics_of
from components.shared.paired import Bounds
from components.shared.protocol import counted, duration
from components.store.store import Store, decode_json

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

PAGES_FROM_RUN = f"../../{runs.PAGES}"
"""The path from runs/<run_id>/report.html to the registry's pages."""

logger = logging.getLogger(__name__)


def run_report(config: RunConfig, store: Store, run_id: str, *, result: dict[str, Any]) -> str:
    """Write the report of a run, however far it got, and return its address. Running it again replaces the page.

    The registry's pages are written as well, if that is possible, because the version in production may have changed.
    OpenLineage gets the events of the run, and the servers of `announce` are told where it moved no alias. `result` is
    the step's: it holds the run's `state`, and gets what is written and who was told. Raises StoreError: the registry
    cannot be reached, or a file of the run is not what it should be.
    """
    files = AdapterFiles(store, config.adapter.name)
    run = read_run(config, files.store, run_id)
    page = build_report(run, pages_at=PAGES_FROM_RUN)
    key = runs.run_key(run_id, runs.REPORT)
    store.put(key, page.encode(), content_type="text/html; charset=utf-8")
    result["report_uri"] = store.uri(key)
    logger.info("report of %d KB at %s", len(page) // 1024, store.uri(key))
    result |= told(config, run, store.uri(key), failed=result.get("state") == "FAILED", environment=os.environ)
    try:
        pages = write_pages(store, config.adapter.name, generated_at=moment(datetime.now(UTC)), files=files)
        logger.info("the registry's pages at %s", pages)
    except FineloopError as exc:  # the report itself is written, so the step does not fail
        logger.warning("the registry's pages are not written: %s", exc)
    emit(config, store, run)
    return store.uri(key)


def read_run(config: RunConfig, store: Store, run_id: str) -> RunFiles:
    """Collect the run's files, its dataset's profile and its version's lineage; what does not exist is left out."""
    store.list(runs.run_key(run_id))  # shows a store that reads once what is missing, so that it is not requested
    metrics_key = runs.run_key(run_id, runs.METRICS)
    records = runs.lying(store, run_id, runs.EVALUATION_RECORDS)
    run = RunFiles(
        run_id=run_id,
        adapter=config.adapter.name,
        alias=config.adapter.alias,
        note=config.adapter.note,
        config_toml=_text(store, runs.run_key(run_id, runs.CONFIG)) or config_file.dumps(config),
        config_digest=config.digest,
        metrics=runs.parse_metrics(_text(store, metrics_key), origin=store.uri(metrics_key)),
        evaluation=runs.find(store, run_id, Evaluation, to_show=True),
        wrong=wrong_answers(records[0]) if records else [],
        decision=runs.find(store, run_id, Decision, to_show=True),
        sweep=runs.find(store, run_id, SweepResult),
        replayed=runs.find(store, run_id, Replayed),
        rate=runs.find(store, run_id, TunedRate),
        steps=runs.steps(store, run_id),
    )
    dataset_id = run.dataset_id
    return replace(
        run,
        profile=_json(store, f"datasets/{dataset_id}/profile.json") if dataset_id else None,
        lineage=_json(store, f"{version_key(run.adapter, run.version)}/{LINEAGE}") if run.version else None,
    )


def _text(store: Store, key: str) -> str:
    stored = store.read(key)
    return stored[0].decode() if stored else ""


def _json(store: Store, key: str) -> dict[str, Any] | None:
    stored = store.read(key)
    return decode_json(stored[0], store.uri(key)) if stored else None


# Pages, each a self-contained file: no font, no request, and no script but the one that searches its own tables.


def build_report(run: RunFiles, *, pages_at: str = "") -> str:
    """Render the whole page. Every text that comes from data or from a model is escaped.

    `pages_at` is the path from this page to the registry's pages; if it is empty, none is linked.
    """
    shown, names = sections.samples(run), comparison.names(run)
    wrong, rest = sections.wrong_answers(run)
    champion, top, rules = run.model("champion"), sections.headline(run), comparison.rules(run)
    sentences = sure_once("\0".join([*top.reasons, *(rule.text for rule, _, _ in rules)])).split("\0")
    drawn = charts.loss_picture({"This run": run.metrics})
    scores = run.evaluation.harness if run.evaluation else None
    return template("report.html").render(
        run=run,
        pages_at=pages_at,
        explained=sections.EXPLAINED,
        forgotten=sections.forgotten(run),
        headline=top,
        reasons=sentences[: len(top.reasons)],
        rule_texts=sentences[len(top.reasons) :],
        facts=sections.run_facts(run),
        costs=sections.costs(run),
        names=names,
        champion=champion.version or "a version without a name" if champion is not None else None,
        panels=comparison.panels(run),
        table=comparison.table(run),
        intervals=comparison.intervals(run),
        slices=comparison.slices(run),
        since_champion=comparison.since_champion(run),
        scores=scores,
        harness=comparison.harness(scores) if scores else [],
        rules=rules,
        samples=shown,
        next_steps=sections.next_steps(run),
        classes=by_class(run.evaluation.confusion if run.evaluation else None),
        wrong=wrong,
        rest=rest,
        counted=counted,
        right_counts=sections.right_counts(shown, names),
        curve=(Markup(drawn[0]), drawn[1]) if drawn else None,
        rates=Markup(charts.rates_picture(run.sweep)) if run.sweep else None,
        data=sections.data_profile(run.profile, run.replayed),
        steps=sections.step_times(run),
        total_time=duration(sum(step.seconds for step in run.steps)),
        origin=sections.origin(run),
        generated_at=moment(run.generated_at),
    )


def build_preview(body: Mapping[str, Any], lines: Sequence[str]) -> str:
    """Render a preview of what a run would make of its data: the output of `ray_jobs.preview`, and its meaning."""
    return template("preview.html").render(
        title=", ".join(source["source"] for source in body["profile"]["sources"]),
        lines=lines,
        problem=body["refused"] or body["gate"]["lacking"],
        data=sections.data_profile(body["profile"]),
        base=body["base"],
        shown=body["shown"],
        unread_because=body["unread_because"],
    )


@dataclass(frozen=True)
class Beside:
    """The comparison of a run with the first one."""

    name: str
    records: int
    confidence: float
    gains: Mapping[str, Bounds]
    turned: Sequence[Any]
    """The records that turned right or wrong, each with id, prompt, reference, before, after and is_right."""

    @property
    def text(self) -> str:
        right = sum(record.is_right for record in self.turned)
        wrong = len(self.turned) - right
        return f"{count(right)} records turned right and {count(wrong)} wrong, of {count(self.records)}"

    @property
    def intervals(self) -> list[charts.Forest]:
        gains = {metric_of(key): (gain_text(key, gain, self.confidence), gain) for key, gain in self.gains.items()}
        return [
            comparison.interval(charts.Gain(metric.title, "", gain.gain, gain.lower, gain.upper, text), metric)
            for metric, (text, gain) in gains.items()
            if math.isfinite(gain.lower) and math.isfinite(gain.upper)
        ]


def build_side_by_side(
    sides: Sequence[Any], differing: Mapping[str, Sequence[str]], beside: Sequence[Beside], *, generated_at: datetime
) -> str:
    """Render several runs side by side, each with its name, run_id, version, note, metrics and curve."""
    drawn = charts.loss_picture({side.name: side.curve for side in sides})
    return template("side_by_side.html").render(
        title=" and ".join(f"“{side.note}”" if side.note else side.name for side in sides),
        columns=sides,
        metrics=metric_rows([side.metrics for side in sides]),
        differing=differing,
        beside=beside,
        curves=Markup(drawn[0]) if drawn else None,
        generated_at=moment(generated_at),
    )


def metric_rows(of_each: Sequence[Mapping[str, float | None]]) -> list[tuple[str, list[str]]]:
    """The rows of metrics: the name, and the value in every run, or a dash if it was not measured."""
    rows = []
    for metric in metrics_of({key for metrics in of_each for key in metrics}):
        values = [metrics.get(metric.key) for metrics in of_each]
        if any(value is not None for value in values):
            rows.append((metric.label, ["-" if value is None else metric.text(value) for value in values]))
    return rows


def gain_text(key: str, gain: Bounds, confidence: float) -> str:
    """A gain with its bounds, in words."""
    metric = metric_of(key)
    return f"{metric.gain_text(gain.gain)}, {metric.range_text(gain.lower, gain.upper, confidence=confidence)}"


# A run's start and end as OpenLineage events (openlineage.io, spec 2-0-2). OpenLineage's own client sends them to the
# address in its variables: OPENLINEAGE_URL and OPENLINEAGE_API_KEY, or the file that OPENLINEAGE_CONFIG names. Both are
# sent when the run has ended, because only then its version's inputs are known.

CONFIGURED_BY = ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG")
NAMESPACE = "fineloop"


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
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.facet_v2 import dataset_version_dataset, error_message_run, job_type_job

    job_type = job_type_job.JobTypeJobFacet(processingType="BATCH", integration="FINELOOP", jobType="PIPELINE")
    job = Job(namespace=NAMESPACE, name=config.adapter.name, facets={"jobType": job_type})

    def event(state: Any, at: str, made_from: Iterable[Ancestor], facets: Mapping[str, Any], outputs: Any) -> RunEvent:
        inputs = dict.fromkeys(place for ancestor in made_from if (place := _place(store, ancestor)))
        return RunEvent(
            eventTime=at,
            producer="urn:fineloop",
            eventType=state,
            run=Run(runId=run_uuid(store, run.run_id), facets=facets),
            job=job,
            inputs=[InputDataset(namespace=namespace, name=name) for namespace, name in inputs],
            outputs=outputs,
        )

    began_at = min((step.started_at for step in run.steps), default=run.generated_at.isoformat())
    sources = [config.data.source] if isinstance(config.data.source, str) else config.data.source
    named = [*(Ancestor("source", source) for source in sources), Ancestor("base", config.model.base)]
    failed = [step for step in run.steps if not step.succeeded]
    error = "; ".join(f"{step.step}: {step.result.get('error', {}).get('message', 'failed')}" for step in failed)
    message = error_message_run.ErrorMessageRunFacet(message=error, programmingLanguage="python")
    outputs = []
    if run.lineage and run.version:
        namespace, name = _named(store.uri(version_key(config.adapter.name, run.version)))
        facets = {"version": dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=run.version)}
        outputs = [OutputDataset(namespace=namespace, name=name, facets=facets)]
    made_from = of_record(run.lineage) if run.lineage else named
    end, ended_at = RunState.FAIL if error else RunState.COMPLETE, run.generated_at.isoformat()
    return [
        event(RunState.START, began_at, named, {}, []),
        event(end, ended_at, made_from, {"errorMessage": message} if error else {}, outputs),
    ]


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
