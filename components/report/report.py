"""The report step: reads what the run left in the store and writes runs/<run_id>/report.html."""

import json
import logging
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from components.config import config_file
from components.config.schema import RunConfig
from components.records import runs
from components.records.runs import Replayed
from components.records.steps import Decision, Evaluation
from components.records.sweep import SweepResult, TunedRate
from components.registry.identity import version_key
from components.registry.versions import LINEAGE
from components.report import open_lineage
from components.report.adapter_files import AdapterFiles
from components.report.continued import find_afresh
from components.report.errors import Wrong, wrong_answers
from components.report.html import moment
from components.report.page import build_report
from components.report.registry_page import write_pages
from components.report.run_files import RunFiles
from components.shared.errors import FineloopError, IntegrityError, ObjectMissing

if TYPE_CHECKING:
    from components.store.store import Store

MOST_DECISIONS = 20
PAGES_FROM_RUN = f"../../{runs.PAGES}"
"""The path from runs/<run_id>/report.html to the registry's pages."""

logger = logging.getLogger(__name__)


def run_report(config: RunConfig, store: "Store", run_id: str) -> str:
    """Write the report of a run, however far it got, and return its address. Running it again replaces the page.

    The registry's pages are written as well, if that is possible, because the version in production may have changed.
    OpenLineage gets the events of the run.

    Raises:
        StoreError: the registry cannot be reached, or a file of the run is not what it should be.
    """
    files = AdapterFiles(store, config.adapter.name)
    run = read_run(config, store, run_id, files)
    page = build_report(run, pages_at=PAGES_FROM_RUN)
    key = runs.run_key(run_id, runs.REPORT)
    store.put(key, page.encode(), content_type="text/html; charset=utf-8")
    logger.info("report of %d KB at %s", len(page) // 1024, store.uri(key))
    try:
        pages = write_pages(store, config.adapter.name, generated_at=moment(datetime.now(UTC)), files=files)
        logger.info("the registry's pages at %s", pages)
    except FineloopError as exc:  # the report itself is written, so the step does not fail
        logger.warning("the registry's pages are not written: %s", exc)
    open_lineage.emit(config, store, run)
    return store.uri(key)


def read_run(config: RunConfig, store: "Store", run_id: str, files: AdapterFiles | None = None) -> RunFiles:
    """Collect the run's files, its dataset's profile and its version's lineage; what does not exist is left out.

    `files` holds what has been read of the adapter so far; what is read here is added to it.
    """
    files = files or AdapterFiles(store, config.adapter.name)
    store = files.store
    store.list(runs.run_key(run_id))  # the listing shows what is missing, so that it is not requested
    metrics_key = runs.run_key(run_id, runs.METRICS)
    run = RunFiles(
        run_id=run_id,
        adapter=config.adapter.name,
        alias=config.adapter.alias,
        note=config.adapter.note,
        config_toml=_text(store, runs.run_key(run_id, runs.CONFIG)) or config_file.dumps(config),
        config_digest=config.digest,
        metrics=parse_metrics(_text(store, metrics_key), origin=store.uri(metrics_key)),
        evaluation=runs.find(store, run_id, Evaluation, to_show=True),
        wrong=_wrong(store, run_id),
        decision=runs.find(store, run_id, Decision, to_show=True),
        sweep=runs.find(store, run_id, SweepResult),
        replayed=runs.find(store, run_id, Replayed),
        rate=runs.find(store, run_id, TunedRate),
        steps=runs.steps(store, run_id),
        decided_before=decided_before(files, config.adapter.alias, run_id),
    )
    dataset_id = run.dataset_id
    run = replace(
        run,
        profile=_json(store, f"datasets/{dataset_id}/profile.json") if dataset_id else None,
        lineage=_json(store, f"{version_key(run.adapter, run.version)}/{LINEAGE}") if run.version else None,
    )
    return replace(run, afresh=find_afresh(files, run))


def decided_before(files: AdapterFiles, alias: str, run_id: str) -> list[Decision]:
    """The gate's decisions on the alias in earlier runs, as far as they are kept, newest first."""
    bodies = [event.body for event in reversed(files.log) if event.body.get("alias") == alias]
    run_ids = [each for each in dict.fromkeys(body.get("run_id") for body in bodies) if each not in (None, "", run_id)]
    return files.decisions(run_ids[:MOST_DECISIONS])


def parse_metrics(text: str, *, origin: str) -> list[dict[str, Any]]:
    """The records of metrics.jsonl. An incomplete last line, left by a job that was killed, is skipped.

    Raises:
        IntegrityError: another line is not JSON.
    """
    lines = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as exc:
            if number == len(lines):
                logger.info("%s ends in the middle of line %d, which is left out", origin, number)
                continue
            raise IntegrityError(f"{origin} line {number} is not JSON: {exc}") from exc
    return records


def _wrong(store: "Store", run_id: str) -> list[Wrong]:
    found = runs.lying(store, run_id, runs.EVALUATION_RECORDS)
    return wrong_answers(found[0]) if found is not None else []


def _text(store: "Store", key: str) -> str:
    found = store.read(key)
    return found[0].decode() if found is not None else ""


def _json(store: "Store", key: str) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = store.get_json(key)
    except ObjectMissing:
        return None
    return value
