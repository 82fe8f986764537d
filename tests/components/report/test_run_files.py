"""What a report says of errors, of cost, and of what to do now. The judge of a command is the command line's parser."""

import io
import json
import re
import shlex
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.report.comparison import rules
from components.report.report import build_report
from components.report.run_files import Wrong, by_class, wrong_answers
from components.report.sections import cost, costs, headline, next_steps
from pipelines import cli
from tests.components.report import example_runs
from tests.components.report.example_runs import CHAMPION, with_evaluation

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
    assert wrong_answers(as_parquet(id=["a"])) == []


def test_classes_stand_worst_first_with_what_they_are_taken_for() -> None:
    assert by_class(CONFUSION) == [("red", 10, 0.6, "blue (3), (another answer) (1)"), ("blue", 4, 1.0, "")]
    assert by_class(None) == []


def test_the_page_shows_both_and_escapes_what_was_said() -> None:
    run = with_evaluation(example_runs.held_run(), confusion=CONFUSION)
    said = "<b>asked</b></script><script>é"
    page = build_report(replace(run, wrong=[Wrong(str(i), said, "a", "") for i in range(2500)]))
    assert "<b>asked" not in page
    assert "<summary>All 2,500 wrong answers</summary>" in page
    (rest,) = re.findall('<script type="application/json" id="wrong-rest">(.*?)</script>', page)
    assert json.loads(rest) == [[said, str(place), "a", "(empty answer)"] for place in range(100, 2500)]
    assert page.count('data-label="Reference"') == 100
    assert ">60%</td>" in page
    assert ">blue (3), (another answer) (1)<" in page
    (matrix,) = re.findall(r'<table class="matrix">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert re.findall(r'<tr><th scope="row">(\w+)', matrix) == ["red", "blue"]  # whose records were asked
    assert re.findall(r"<strong>(\d+)</strong>", matrix) == ["6", "4"]


def test_rules_that_failed_come_first() -> None:
    states = [rule.short for rule, _, _ in rules(example_runs.held_run())]
    assert states[0] == "failed"
    assert states == sorted(states, key=["failed", "cannot tell", "needs approval", "passed"].index)


def test_each_next_step_is_a_command_that_exists() -> None:
    last = []
    for run in (example_runs.promoted_run(), example_runs.held_run(), example_runs.waiting_run()):
        steps = [shlex.split(command) for command, _ in next_steps(run)]
        assert steps[0] == ["fineloop", "chat", f"{run.adapter}@{run.version}"]
        for command in steps:
            cli.parser().parse_args(command[1:])
        last.append(steps[-1][1:3])
    assert [last[0], last[1][0], last[2]] == [["adapters", "rollback"], "replay", ["adapters", "approve"]]


def test_where_a_training_began_is_told() -> None:
    run = example_runs.promoted_run()
    assert headline(run).lead.endswith(f"It went on from {CHAMPION}.")
    assert run.lineage is not None
    assert "went on" not in headline(replace(run, lineage={**run.lineage, "parents": []})).lead


# What a training cost, beside figures worked out by hand: four workers for an hour and a half are 6 hours.
USED = {
    "workers": 4, "gpu": "", "held_s": 21600.0, "in_steps_s": 16200.0, "tokens": 12_000_000, "restarts": 0,
    "steps_repeated": 0, "flops": None, "flops_with_parents": None, "s3_requests": 1, "s3_read_bytes": 2_500_000,
    "s3_written_bytes": 0, "price": None, "price_source": "",
}  # fmt: skip
IN_STEPS = " until the last step, 75% of them in steps;"
ASKED = "1 S3 request of the workers, 2.5 MB read, 0.0 MB written"
PRICED = {"gpu": "NVIDIA H100", "price": 41.28, "price_source": "AWS p5.48xlarge / 8, November 2026"}
AGAIN = {"restarts": 1, "steps_repeated": 40, "flops": 2e18, "flops_with_parents": 5e18}


@pytest.mark.parametrize(
    ("usage", "result", "text"),
    [
        ({}, {}, f"6.00 worker-hours{IN_STEPS} 2,000,000 tokens a worker-hour; {ASKED}"),
        (
            PRICED,
            {},
            f"6.00 GPU-hours{IN_STEPS} 2,000,000 tokens a GPU-hour; {ASKED}; $41.28 ({PRICED['price_source']})",
        ),
        (
            AGAIN,
            {"resumed_from_step": 100},
            "6.00 worker-hours of the job that took the last step; 1 restart, 40 steps taken twice; 2e+18 FLOPs, 5e+18 "
            f"with what it went on from; {ASKED}",
        ),
    ],
)
def test_a_training_says_what_it_cost(usage: dict[str, Any], result: dict[str, Any], text: str) -> None:
    run = example_runs.promoted_run()
    steps = [
        step.model_copy(update={"result": {**step.result, "usage": {**USED, **usage}, **result}})
        if step.step == "finetune"
        else step
        for step in run.steps
    ]
    assert cost(replace(run, steps=steps)) == text
    assert ("Training cost", text) in costs(replace(run, steps=steps))
    assert costs(run) == []
