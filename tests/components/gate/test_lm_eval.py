"""A candidate that has unlearned what its base can do is held for that, where the documents of a task can show it."""

import numpy as np
import pytest

from components.config.gate import GateConfig
from components.gate.policy import significant
from components.records.steps import Decision, Evaluation, HarnessScores, TaskScore
from components.shared.paired import shown_worse
from tests.components.gate.evidenced import decide, evaluation, model, rule

ITEMS = 24


def task(name: str, *, base: int, won: int = 0, lost: int = 0) -> list[TaskScore]:
    """The base passes the first `base` documents, of which the candidate loses some, and wins others."""
    both = [place < base for place in range(ITEMS)], [lost <= place < base + won for place in range(ITEMS)]
    return [TaskScore(task=name, metric="passes", value=sum(p) / ITEMS, passes=tuple(p)) for p in both]


def scored(name: str, base: float | None, ours: float | None, stderr: float, *, lower: bool = False) -> list[TaskScore]:
    about = {"task": name, "metric": "acc", "stderr": stderr, "lower_is_better": lower}
    return [TaskScore(value=value, **about) for value in (base, ours)]


def decided(*tasks: list[TaskScore], by: float = 0.0, left_out: str = "") -> Decision:
    base, ours = (tuple(both[place] for both in tasks) for place in range(2))
    harness = HarnessScores(lm_eval="0", tasks=(), left_out=left_out, scores={"base": base, "candidate": ours})
    measured = evaluation(model("v2"), model(loss=9.0), model("v1")).model_copy(update={"harness": harness})
    return decide(measured, GateConfig(lm_eval_worse_by={both[0].task: by for both in tasks} or {"json": by}))


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.2])
def test_equal_models_and_those_at_the_margin_are_hardly_ever_shown_to_be_worse(margin: float) -> None:
    """Over every outcome of 24 items, by the trinomial distribution, whatever share of them differs."""
    from scipy.stats import multinomial

    outcomes = np.array([(won, lost) for won in range(ITEMS + 1) for lost in range(ITEMS + 1 - won)])
    shown = np.array([shown_worse(won, lost, ITEMS, margin, 0.95) for won, lost in outcomes.tolist()])
    cells = np.column_stack([outcomes, ITEMS - outcomes.sum(axis=1)])
    errors = [
        multinomial.pmf(cells, ITEMS, [(differ - margin) / 2, (differ + margin) / 2, 1 - differ])[shown].sum()
        for differ in np.linspace(max(margin, 0.02), 1.0, 25)
    ]
    # McNemar's test is exact; Tango's, like every score test, is so on average, and here errs little more often.
    assert max(errors) <= (0.05 if margin == 0 else 0.06)
    assert max(errors) > 0.02


def test_holms_steps_are_those_of_sorted_chances() -> None:
    def shows(chances: list[float]) -> set[int]:
        return significant(len(chances), 0.95, lambda index, level: chances[index] <= 1 - level)

    # Holm 1979: the k-th smallest of n is held to alpha / (n - k + 1); the first that fails ends it.
    assert shows([0.012, 0.016, 0.024, 0.04]) == {0, 1, 2, 3}
    assert shows([0.013, 0.016, 0.024, 0.04]) == set()
    assert shows([0.04, 0.012, 0.03, 0.016]) == {1, 3}
    assert shows([]) == set()


@pytest.mark.parametrize(
    ("tasks", "by", "verdict", "text"),
    [
        ([task("json", base=20, lost=10), task("no", base=20)], 0.0, "hold", "1 of 2 tasks: json (passes 0.4167"),
        ([task("json", base=20, lost=5), task("over", base=12, won=4, lost=8)], 0.0, "promote", "not shown"),
        ([task("json", base=20, lost=5)], 0.0, "hold", "json"),  # a chance of 1/32, of which two tasks allow half
        ([task("json", base=20, lost=15), task("over", base=20, lost=5)], 0.0, "hold", "in 2 of 2 tasks"),  # Holm
        ([task("json", base=20, lost=6)], 0.2, "promote", ""),
        ([task("json", base=20, lost=16)], 0.2, "hold", ""),
        ([task("json", base=3, lost=3)], 0.0, "cannot tell", "Of json the base passes too little for a loss to show."),
        ([task("json", base=3, lost=3), task("over", base=20)], 0.0, "promote", "Of json the base passes too little"),
        ([scored("mmlu", 0.5, 0.45, 0.004)], 0.03, "hold", "mmlu (acc 0.45 ± 0.004 against 0.5 ± 0.004)"),
        ([scored("mmlu", 0.5, 0.45, 0.01)], 0.03, "promote", ""),
        ([scored("wikitext", 9.0, 9.5, 0.01, lower=True)], 0.1, "hold", ""),
        ([scored("mmlu", 0.5, None, 0.01)], 0.1, "hold", "Of mmlu it is not known what base and candidate score."),
        ([], 0.1, "hold", "Of json it is not known"),
    ],
)
def test_what_is_shown_to_be_unlearned_holds_the_candidate(tasks, by: float, verdict: str, text: str) -> None:
    decision = decided(*tasks, by=by)
    assert decision.verdict == verdict
    assert text in rule(decision, "lm_eval").text


def test_scores_that_were_left_out_hold_the_candidate_with_the_reason() -> None:
    assert "score, as its workers do." in decided(left_out="as its workers do").reasons[0]


def test_nothing_is_asked_by_default_and_scores_are_part_of_what_the_rule_follows_from() -> None:
    measured = evaluation(model("v2"), model(loss=9.0), model("v1"))
    assert "lm_eval" not in {each.name for each in decide(measured, GateConfig()).rules}
    harness = HarnessScores(lm_eval="0", tasks=(), scores={"base": tuple(task("json", base=9))})
    with_scores = measured.model_copy(update={"harness": harness})
    assert decide(with_scores, GateConfig()).basis_sha256 == decide(measured, GateConfig()).basis_sha256
    one = decided(task("json", base=20, lost=1))
    assert one.basis_sha256 != decided(task("json", base=20)).basis_sha256
    again = Evaluation.from_json(with_scores.as_json(), "s3://b/evaluation.json")
    assert again.harness == harness
