"""What a run gained by going on from a version, beside one that started afresh on the same data."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from components.records import runs
from components.records.steps import Evaluation
from components.registry import ancestry, versions
from components.report.run_files import Afresh, RunFiles
from components.shared.errors import IntegrityError
from components.shared.metrics import METRICS

if TYPE_CHECKING:
    from components.store.store import Store

OF_THE_START = ("start_from", "start_share")
"""Keys of train that say where a training starts, and what of that stays."""


def parent_of(lineage: Mapping[str, Any] | None) -> str | None:
    """The version that the training went on from; None where it started afresh."""
    parents = [each.name for each in ancestry.of_record(lineage or {}) if each.kind == "parent"]
    return parents[0].rpartition("/")[2] if parents else None


def find_afresh(store: "Store", run: RunFiles) -> Afresh | None:
    """The newest version that the same config, but for where it starts, trained from the base on the same dataset.

    None where there is none, or it was compared on other records.
    """
    if run.lineage is None or run.evaluation is None or parent_of(run.lineage) is None:
        return None
    try:
        return _like(store, run.adapter, run.lineage, run.evaluation)
    except IntegrityError:  # an audit reports it; this report is of the run
        return None


def _like(store: "Store", name: str, ours: Mapping[str, Any], evaluation: Evaluation) -> Afresh | None:
    wanted = _but_for_its_start(ours)
    for version in ancestry.descendants(store, name, {"dataset": evaluation.dataset_id}):
        lineage = versions.read_lineage(store, version)
        if parent_of(lineage) is not None or _but_for_its_start(lineage) != wanted:
            continue
        found = runs.find(store, version.run_id, Evaluation) if version.run_id else None
        if found and (found.dataset_id, found.records) == (evaluation.dataset_id, evaluation.records):
            return Afresh(version.version, found)
    return None


def sentence(run: RunFiles) -> str:
    """Where the training began, and what that gained where both ways were run; empty where it started afresh."""
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


def _but_for_its_start(lineage: Mapping[str, Any]) -> dict[str, Any]:
    config = lineage.get("config") or {}
    train = {key: value for key, value in (config.get("train") or {}).items() if key not in OF_THE_START}
    return {**config, "train": train}
