"""`fineloop compare`; the judge of its bounds is the gate's own decision on a run whose champion is the other run's."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import config_file
from components.config.gate import GateConfig
from components.config.schema import AdapterConfig
from components.gate import policy
from components.gate.comparisons import read_evidence
from components.records import runs
from components.records.steps import Evaluation, Measured
from components.report.html import SEARCH
from components.shared.errors import DataError, UserError
from components.store.store import Store
from pipelines.local import past_runs
from tests.pipelines.command_line import body, fineloop

pytestmark = pytest.mark.usefixtures("forked")

RECORDS = 80


def columns(role: str, seed: int) -> dict[str, Any]:
    drawn = np.random.default_rng(seed)
    right = drawn.random(RECORDS) < 0.4 + 0.2 * seed
    return {
        f"{role}_nll": drawn.gamma(2.0, 1.5 - 0.3 * seed, RECORDS),
        f"{role}_exact_match": right.astype(float),
        f"{role}_answer": [f"answer {place}" if each else "no" for place, each in enumerate(right)],
    }


def keep(store: Store, run_id: str, config: str, versions: dict[str, str], of: dict[str, Any], order: Any) -> None:
    """A run that compared these versions, by role; its records lie in this order."""
    models = {"base": Measured(metrics={"loss": 9.0, "exact_match": 0.0})}
    for role, version in versions.items():
        loss = float(of[f"{role}_nll"].sum() / sum(of["answer_tokens"]))
        metrics = {"loss": loss, "exact_match": float(of[f"{role}_exact_match"].mean())}
        models[role] = Measured(version=version, metrics=metrics)
    sink = io.BytesIO()
    pq.write_table(pa.table(of).take(order), sink)
    behind = hashlib.sha256(sink.getvalue()).hexdigest()
    store.put(runs.run_key(run_id, runs.EVALUATION_RECORDS), sink.getvalue())
    store.put(runs.run_key(run_id, runs.CONFIG), config.encode())
    runs.write(store, run_id, Evaluation(run_id=run_id, records=RECORDS, models=models, records_sha256=behind))
    curve = [{"kind": "train", "step": step, "loss": 3 / step} for step in range(1, 9)]
    curve.append({"kind": "eval", "step": 8, "loss": 0.5})
    store.put(runs.run_key(run_id, runs.METRICS), "".join(json.dumps(each) + "\n" for each in curve).encode())


def two_runs(store: Store, config_path: Path, *, grouped: bool = False) -> None:
    """run-one, and run-two, whose champion was run-one's candidate; run-one's records lie in another order."""
    shared: dict[str, Any] = {
        "id": [str(place) for place in range(RECORDS)],
        "prompt": [json.dumps([["user", f"question <{place}>"]]) for place in range(RECORDS)],
        "reference": [f"answer {place}" for place in range(RECORDS)],
        "answer_tokens": [1 + place % 5 for place in range(RECORDS)],
        **({"group": [str(place // 2) for place in range(RECORDS)]} if grouped else {}),
    }
    ours, theirs = columns("candidate", 2), columns("champion", 1)
    first = {name.replace("champion", "candidate"): values for name, values in theirs.items()}
    one, two = (
        config_file.dumps(config_file.load(config_path, [f"train.epochs={epochs}", f"adapter.note={note}"]))
        for epochs, note in ((1, "one"), (3, "two"))
    )
    order = np.random.default_rng(0).permutation(RECORDS)
    keep(store, "run-one", one, {"candidate": "v1"}, shared | first, order)
    keep(store, "run-two", two, {"champion": "v1", "candidate": "v2"}, shared | ours | theirs, np.arange(RECORDS))


def sides(store: Store) -> list[past_runs.Side]:
    return [past_runs.read_side(store, run_id) for run_id in ("run-one", "run-two")]


@pytest.mark.parametrize(("metric", "grouped"), [("loss", False), ("loss", True), ("exact_match", False)])
def test_the_bounds_are_those_that_the_gate_decided_by(metric, grouped, store, config_path):
    two_runs(store, config_path, grouped=grouped)
    evaluation = runs.read(store, "run-two", Evaluation)
    found = past_runs.compare(*sides(store))
    asked = GateConfig(metric=metric, better_than_base_by=0, worse_than_champion_by=0.1, min_records=2)
    decision = policy.decide(evaluation, read_evidence(store, evaluation), asked, AdapterConfig(name="sums"))
    (rule,) = [each for each in decision.rules if each.name == "not_worse_than_champion"]
    gain = found.gains[metric]
    assert (gain.gain, gain.lower, gain.upper) == (rule.gain, rule.lower, rule.upper)
    assert (found.records, found.confidence) == (RECORDS, rule.confidence)


def test_screen_json_and_page_say_what_differs_and_what_turned(store: Store, config_path: Path, tmp_path: Path) -> None:
    two_runs(store, config_path)
    arguments = ("compare", "run-o", "run-two", "-c", config_path, "--html", "out.html", "--json")
    done = fineloop(*arguments, cwd=tmp_path)
    printed = body(done)
    assert printed["config"] == {"train.epochs": [1.0, 3.0]}
    assert [run["note"] for run in printed["runs"]] == ["one", "two"]
    (against,) = printed["against_first"]
    before, after = (columns("candidate", seed)["candidate_exact_match"] for seed in (1, 2))
    turned = {str(place): bool(now) for place, (was, now) in enumerate(zip(before, after, strict=True)) if was != now}
    assert {each["id"]: each["is_right"] for each in against["turned"]} == turned
    right = sum(turned.values())
    assert f"{right} turned right, {len(turned) - right} wrong" in done.stderr
    page = (tmp_path / "out.html").read_text()
    assert "question &lt;" in page
    assert "question <" not in page
    assert f"{right} records turned right and {len(turned) - right} wrong, of {RECORDS}" in page
    assert page.count("<circle") >= 4  # a held-out loss and an interval's middle of each
    assert page.count("<script") == page.count(f"<script>{SEARCH}</script>") == 1

    done = fineloop("compare", "run-two", "run-two", "run-one", "-c", config_path, cwd=tmp_path)
    assert "run-two and run-two are the same version, v2\n" in done.stdout
    assert done.stdout.count(" turned right, ") == 1


def test_runs_without_a_common_record_or_an_evaluation_are_refused(store: Store, config_path: Path) -> None:
    two_runs(store, config_path)
    first, other = sides(store)
    ids = pa.array([f"x{place}" for place in range(RECORDS)])
    elsewhere = other.records.set_column(0, "id", ids)
    with pytest.raises(DataError, match="run-one and run-two were measured on no common record"):
        past_runs.compare(first, replace(other, records=elsewhere))
    store.put(runs.run_key("bare", runs.CONFIG), b"")
    with pytest.raises(UserError, match="run bare evaluated nothing"):
        past_runs.read_side(store, "bare")


def test_losses_of_other_tokens_are_not_compared(store: Store, config_path: Path) -> None:
    two_runs(store, config_path)
    first, other = sides(store)
    twice = pa.array([2 * count for count in other.records.column("answer_tokens").to_pylist()])
    place = other.records.column_names.index("answer_tokens")
    longer = other.records.set_column(place, "answer_tokens", twice)
    found = past_runs.compare(first, replace(other, records=longer))
    assert set(found.gains) == {"exact_match"}
