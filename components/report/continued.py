"""What a run gained by going on from a version, compared with one that started afresh on the same data."""

from collections.abc import Mapping
from typing import Any

from components.registry.lineage import of_record
from components.report.adapter_files import AdapterFiles, trained
from components.report.run_files import Afresh, RunFiles
from components.shared.metrics import METRICS


def parent_of(lineage: Mapping[str, Any] | None) -> str | None:
    """The version that the training went on from; None if it started afresh."""
    parents = [each.name for each in of_record(lineage or {}) if each.kind == "parent"]
    return parents[0].rpartition("/")[2] if parents else None


def find_afresh(files: AdapterFiles, run: RunFiles) -> Afresh | None:
    """The newest version that was trained from the base on the same dataset, with the config otherwise the same.

    None if there is none, or it was compared on other records.
    """
    if run.lineage is None or run.evaluation is None or parent_of(run.lineage) is None:
        return None
    wanted = {**trained(run.lineage), "dataset": run.evaluation.dataset_id, "parent": ""}
    for version, entry in files.entries.items():
        evaluation = files.published(version).evaluation if entry["trained"] == wanted else None
        if evaluation is not None and evaluation.records == run.evaluation.records:
            return Afresh(version, evaluation)
    return None


def sentence(run: RunFiles) -> str:
    """Say where the training began, and what that gained if both ways were run; empty if it started afresh."""
    parent = parent_of(run.lineage)
    if parent is None:
        return ""
    ours = run.metric("candidate", "loss")
    theirs = run.afresh.evaluation.metric("candidate", "loss") if run.afresh else None
    if run.afresh is None or ours is None or theirs is None:
        return f"It went on from {parent}."
    loss = METRICS["loss"]
    gained = f"{loss.gain_text(loss.gain(ours, theirs))} in {loss.unit}"
    return (
        f"It went on from {parent}. Compared with {run.afresh.version}, which the same config trained from the base "
        f"on the same data: {gained}, as far as one run of each can tell."
    )
