from components.gate.gate import as_markdown
from tests.components.report import example_runs


def summary(loss: float) -> str:
    evaluation = example_runs.evaluation(
        "r", example_runs.metrics(loss, 0.7, 0.8, 1.2), example_runs.metrics(1.0, 0.6, 0.7, 1.0)
    )
    return as_markdown(example_runs.decision(evaluation))


def test_a_promotion_names_its_version_and_a_refusal_its_reasons_and_both_every_rule() -> None:
    text = summary(0.9)
    assert text.startswith(f"# Promote: icd10-chapters@production takes {example_runs.CANDIDATE}\n")
    rule = "Loss better than the base model's | 0.900 | 2.306 | better by at least 0.05 | `gate.better_than_base_by`"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert f"| passed | {rule} |" in rows
    assert len(rows) == 2 + 8
    assert {row.replace("\\|", "").count("|") for row in rows} == {7}
    assert example_runs.CHAMPION in text
    held = summary(1.5)
    assert held.startswith("# Hold: icd10-chapters@production stays as it is\n")
    assert "- The candidate's loss of 1.500" in held
    assert "| **failed** | Loss not worse than production's | 1.500 | 1.000 |" in held
