"""The table of tasks of lm-evaluation-harness."""

from dataclasses import replace

from components.records.steps import Evaluation, HarnessScores, TaskScore
from components.report.comparison import harness
from components.report.report import build_report
from components.report.run_files import RunFiles
from tests.components.report.example_runs import promoted_run

SCORES = {
    "base": (TaskScore(task="arc_<easy>", metric="acc", value=0.61234, stderr=0.0487),),
    "candidate": (
        TaskScore(task="arc_<easy>", metric="acc", value=0.5, stderr=None),
        TaskScore(task="wikitext", metric="word_perplexity", value=None),
    ),
}


def run(found: HarnessScores) -> RunFiles:
    promoted = promoted_run()
    assert promoted.evaluation is not None
    return replace(promoted, evaluation=promoted.evaluation.model_copy(update={"harness": found}))


def test_each_model_has_its_value_with_its_standard_error() -> None:
    found = HarnessScores(lm_eval="0.4.13", tasks=("arc_<easy>", "wikitext"), limit=50, scores=SCORES)
    table = harness(run(found))
    assert table is not None
    dash = "\N{EN DASH}"
    assert [(row.task, row.metric, dict(row.texts)) for row in table.rows] == [
        ("arc_<easy>", "acc", {"base": "0.6123 ± 0.049", "champion": dash, "candidate": "0.5"}),
        ("wikitext", "word_perplexity", {"base": dash, "champion": dash, "candidate": dash}),
    ]
    page = build_report(run(found))
    assert "arc_&lt;easy&gt;" in page
    assert "0.6123 ± 0.049" in page
    assert "each task's first 50" in page
    assert "lm-eval 0.4.13" in page


def test_what_is_left_out_is_said_and_without_tasks_there_is_no_table() -> None:
    left_out = HarnessScores(lm_eval="0.4.13", tasks=("wikitext",), left_out="as it is so")
    page = build_report(run(left_out))
    assert "Left out, as it is so." in page
    assert "Table of tasks" not in page
    assert harness(promoted_run()) is None
    assert "lm-evaluation-harness" not in build_report(promoted_run())


def test_the_record_is_read_as_it_was_written_and_keeps_keys_that_came_later() -> None:
    found = HarnessScores(lm_eval="0.4.13", tasks=("arc_<easy>", "wikitext"), scores=SCORES, later=1)
    written = run(found).evaluation
    assert written is not None
    assert Evaluation.from_json(written.as_json(), "s3://x").harness == found
