"""What a report says of errors and of what to do now. The judge of a command is the command line's own parser."""

import io
import json
import re
import shlex
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.records import runs
from components.records.steps import Evaluation, Measured
from components.registry.versions import Version, publish_version
from components.report.comparison import rules
from components.report.report import build_report, read_run
from components.report.run_files import Wrong, by_class, matrix, sentence, wrong_answers
from components.report.sections import headline, next_steps
from components.store.store import Store
from pipelines import cli
from tests.components.report import example_runs
from tests.components.report.example_runs import CONFIG

CONFUSION = {"labels": ["red", "blue", "(another answer)"], "counts": [[6, 3, 1], [0, 4, 0], [0, 0, 0]]}


def as_parquet(**columns: list[object]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def test_wrong_answers_are_those_that_are_not_exact() -> None:
    prompts = [json.dumps([["system", "s"], ["user", f"question {place}"]]) for place in range(3)]
    columns = {"id": ["a", "b", "c"], "prompt": prompts, "reference": ["x", "y", "z"]}
    body = as_parquet(**columns, candidate_answer=["x", "no", ""], candidate_exact_match=[1.0, 0.0, 0.0])
    assert wrong_answers(body) == [Wrong("b", "question 1", "y", "no"), Wrong("c", "question 2", "z", "")]
    assert wrong_answers(as_parquet(id=["a"])) == []  # as release 0.1.0's stand-ins


def test_classes_stand_worst_first_with_what_they_are_taken_for() -> None:
    red, blue = by_class(CONFUSION)
    assert (red.name, red.records, red.share, red.mistaken_for) == ("red", 10, "60%", "blue (3), (another answer) (1)")
    assert (blue.name, blue.share, blue.mistaken_for) == ("blue", "100%", "")
    drawn = matrix(CONFUSION)
    assert drawn is not None
    assert [label for label, _ in drawn.rows] == ["red", "blue"]
    assert by_class(None) == []


def test_the_page_shows_both_and_escapes_what_was_said() -> None:
    run = example_runs.held_run()
    assert run.evaluation
    evaluation = run.evaluation.model_copy(update={"confusion": CONFUSION})
    said = "<b>asked</b></script><script>é"
    page = build_report(replace(run, evaluation=evaluation, wrong=[Wrong(str(i), said, "a", "") for i in range(2500)]))
    assert "<b>asked" not in page
    assert "<summary>All 2,500 wrong answers</summary>" in page
    (rest,) = re.findall('<script type="application/json" id="wrong-rest">(.*?)</script>', page)
    assert json.loads(rest) == [[said, str(place), "a", "(empty answer)"] for place in range(100, 2500)]
    assert page.count('data-label="Reference"') == 100
    assert ">blue (3), (another answer) (1)<" in page


def test_rules_that_failed_come_first() -> None:
    states = [row.rule.short for row in rules(example_runs.held_run())]
    assert states[0] == "failed"
    assert states == sorted(states, key=["failed", "cannot tell", "needs approval", "passed"].index)


def test_each_next_step_is_a_command_that_exists() -> None:
    for run in (example_runs.promoted_run(), example_runs.held_run()):
        steps = next_steps(run)
        assert steps[0][0] == f"fineloop chat {run.adapter}@{run.version}"
        for command, _ in steps:
            cli.parser().parse_args(shlex.split(command)[1:])
    assert [step[0].split()[1:3] for step in next_steps(example_runs.promoted_run())][-1] == ["adapters", "rollback"]
    assert [step[0].split()[1] for step in next_steps(example_runs.held_run())][-1] == "replay"


# What the report says of a run that went on from a version.

NAME = CONFIG.adapter.name


def trained(
    store: Store,
    run_id: str,
    *,
    loss: float,
    parents: tuple[str, ...] = (),
    dataset: str = "d1",
    rate: float = 1e-3,
    records: int = 250,
) -> Version:
    """A version with its run's comparison."""
    start = "production" if parents else "base"
    kept = 0.5 if parents else 0.0
    train = {"learning_rate": rate, "start_from": start, "start_share": kept}
    config = {"train": train, "method": {"name": "lora"}}
    lineage = {"run_id": run_id, "config": config, "dataset": {"dataset_id": dataset}, "parents": list(parents)}
    files = {"adapter_model.safetensors": run_id.encode(), "adapter_config.json": b"{}"}
    version = publish_version(store, NAME, files, lineage=lineage)
    models = {"candidate": Measured(version=version.version, metrics={"loss": loss})}
    runs.write(store, run_id, Evaluation(run_id=run_id, dataset_id=dataset, records=records, models=models))
    return version


def sentence_of(store: Store, run_id: str) -> str:
    return sentence(read_run(CONFIG, store, run_id))


def test_what_going_on_gained_is_told_against_the_same_training_from_the_base(store: Store) -> None:
    first = trained(store, "first", loss=0.5, dataset="d0")
    afresh = trained(store, "afresh", loss=0.3)
    trained(store, "goes-on", loss=0.27, parents=(first.uri,))
    assert sentence_of(store, "goes-on") == (
        f"It went on from {first.version}. Compared with {afresh.version}, which the same config trained from the base "
        "on the same data: 0.030 better in nats per answer token, as far as one run of each can tell."
    )
    assert sentence_of(store, "goes-on") in headline(read_run(CONFIG, store, "goes-on")).lead
    assert sentence_of(store, "afresh") == ""


@pytest.mark.parametrize(
    "other",
    [{"dataset": "d2"}, {"rate": 2e-3}, {"parents": ("s3://b/adapters/x/versions/v1",)}, {"records": 100}],
)
def test_a_training_that_differs_in_more_than_its_start_is_no_comparison(store: Store, other: dict[str, Any]) -> None:
    first = trained(store, "first", loss=0.5, dataset="d0")
    trained(store, "other", loss=0.3, **other)
    trained(store, "goes-on", loss=0.27, parents=(first.uri,))
    assert sentence_of(store, "goes-on") == f"It went on from {first.version}."


def test_before_anything_was_measured_only_where_it_began_is_told(store: Store) -> None:
    first = trained(store, "first", loss=0.5)
    trained(store, "goes-on", loss=0.27, parents=(first.uri,))
    assert sentence(replace(read_run(CONFIG, store, "goes-on"), evaluation=None)) == f"It went on from {first.version}."
