"""What a report says of errors and of what to do now. The judge of a command is the command line's own parser."""

import io
import json
import re
import shlex
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from components.report.comparison import rules
from components.report.page import build_report
from components.report.run_files import Wrong, by_class, matrix, wrong_answers
from components.report.sections import next_steps
from pipelines import cli
from tests.components.report import example_runs

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
