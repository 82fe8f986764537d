"""One policy for answers of three tokens and of two hundred, on losses that were measured on the real model.

`python -m benchmarks.gate` has trained it on the example and on docstrings, and kept what every held-out record
costs the base and the trained model. What is judged here is the trained one, as it is or made worse.
"""

import numpy as np
import pytest

from components.config.gate import GateConfig
from components.records.steps import Decision
from tests.components.gate.evidenced import decide, rule
from tests.components.gate.measured_losses import read

TASKS = {"icd10": 3, "docstrings": 199}
"""With the tokens of an answer, on average."""
POLICY = GateConfig(margins="relative", worse_than_champion_by=0.05)


def decided(
    task: str,
    policy: GateConfig = POLICY,
    *,
    records: int | None = None,
    worse_by: float | None = None,
    prompts_matter: bool = True,
) -> Decision:
    """On the trained model; with `worse_by`, against itself, on records that each cost so much more, give or take."""
    found = read(task)
    rows = np.arange(len(found.tokens))[:records]
    nll, other = (found.columns[f"seed0_{kept}"][rows] for kept in ("nll", "other_prompt_nll"))
    random = np.random.default_rng(0)
    changed = {}
    roles = {"base": "base", "candidate": "seed0"}
    if worse_by is not None:
        roles["champion"] = "seed0"
        spread = 0.02 * random.standard_normal(len(rows))
        changed["candidate_nll"] = nll * (1 + worse_by + spread - (spread * nll).sum() / nll.sum())
        changed["candidate_other_prompt_nll"] = other * (1 + worse_by)
    if not prompts_matter:
        changed["candidate_other_prompt_nll"] = nll * (1 + 0.001 * random.standard_normal(len(rows)))
    measured, evidence = found.of(rows, roles, changed)
    return decide(measured, policy, evidence)


@pytest.mark.parametrize("task", TASKS)
def test_the_trained_model_is_promoted(task: str) -> None:
    assert decided(task).verdict == decided(task, GateConfig()).verdict == "promote"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("worse_by", "verdict"), [(0.0, "promote"), (0.02, "promote"), (0.1, "hold")])
def test_as_much_worse_passes_or_fails_whatever_the_length(task: str, worse_by: float, verdict: str) -> None:
    decision = decided(task, worse_by=worse_by)
    assert decision.verdict == verdict
    asked = rule(decision, "not_worse_than_champion")
    assert asked.gain == pytest.approx(-worse_by, abs=1e-6)
    assert asked.passed is (verdict == "promote")


def test_a_margin_per_token_allows_long_answers_many_times_as_much() -> None:
    per_token = GateConfig(worse_than_champion_by=0.06, guards=[])
    allowed = {task: decided(task, per_token, worse_by=0.02) for task in TASKS}
    assert {task: decision.verdict for task, decision in allowed.items()} == dict.fromkeys(TASKS, "promote")
    lost = {task: 0.02 * read(task).columns["seed0_nll"].mean() for task in TASKS}  # nats per answer
    assert lost["docstrings"] > 100 * lost["icd10"]
    per_answer = GateConfig(metric="answer_loss", worse_than_champion_by=0.2, better_than_base_by=0.2, guards=[])
    assert [decided(task, per_answer, worse_by=0.02).verdict for task in TASKS] == ["promote", "hold"]


@pytest.mark.parametrize("task", TASKS)
def test_answers_that_do_not_depend_on_their_prompts_are_held_whatever_the_length(task: str) -> None:
    decision = decided(task, prompts_matter=False)
    assert decision.verdict == "hold"
    assert all(reason.startswith("Answers do not depend on their prompts") for reason in decision.reasons)
    assert rule(decided(task), "limit_min").lower > 1.0


@pytest.mark.parametrize("task", TASKS)
def test_too_few_records_tell_nothing(task: str) -> None:
    decision = decided(task, records=20)
    assert decision.verdict == "cannot tell"
    assert "on 20 records, and at least 30 are asked for" in decision.reasons[0]


@pytest.mark.parametrize(("task", "tokens"), TASKS.items())
def test_the_tasks_are_what_they_are_said_to_be(task: str, tokens: int) -> None:
    assert read(task).tokens.mean() == pytest.approx(tokens, rel=0.1)
