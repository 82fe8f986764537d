"""What is asked of answers of any length: margins that are relative or for a whole answer, and prompts that matter."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from components.config.gate import GateConfig
from components.gate.comparisons import Evidence
from tests.components.gate.evidenced import decide, evaluation, evidence, model, rule


# One-sided t bounds of 300 records: 1.65 standard errors on either side.
@pytest.mark.parametrize(
    ("gain", "error", "verdict", "said"),
    [
        (0.5, 0.11, "promote", "depend on"),
        (0.5, 0.14, "cannot tell", "may not depend on"),
        (0.1, 0.14, "cannot tell", "may not depend on"),
        (0.1, 0.11, "hold", "do not depend on"),
    ],
)
def test_that_answers_depend_on_their_prompts_has_to_be_sure(gain, error: float, verdict: str, said: str) -> None:
    measured = evaluation(model("v2", answer_prompt_gain=gain), model(loss=9.0))
    found = evidence(measured)
    spread = np.random.default_rng(0).standard_normal(300)
    gains = gain + error * math.sqrt(300) * (spread - spread.mean()) / spread.std(ddof=1)
    others = found.columns["candidate_nll"] + gains
    decision = decide(
        measured, GateConfig(), replace(found, columns={**found.columns, "candidate_other_prompt_nll": others})
    )
    assert decision.verdict == verdict
    asked = rule(decision, "limit_min")
    assert asked.text.startswith(f"Answers {said} their prompts: seeing its own prompt")
    assert asked.lower == pytest.approx(gain - 1.65 * error, abs=0.1 * error)


# The champion's loss is 1.0 and the candidate's 1.03, of answers of 4 tokens and of 200.
@pytest.mark.parametrize("tokens", [4.0, 200.0])
@pytest.mark.parametrize(
    ("policy", "verdicts"),
    [
        ({"margins": "relative", "worse_than_champion_by": 0.05}, ("promote", "promote")),
        ({"margins": "relative", "worse_than_champion_by": 0.02}, ("hold", "hold")),
        ({"metric": "answer_loss", "worse_than_champion_by": 0.5}, ("promote", "hold")),
        ({"worse_than_champion_by": 0.05}, ("promote", "promote")),
    ],
)
def test_margins_may_be_relative_or_for_a_whole_answer(tokens: float, policy: dict[str, Any], verdicts) -> None:
    losses = {"candidate": 1.03, "base": 9.0, "champion": 1.0}
    models = {
        role: model(None if role == "base" else role, loss=loss, answer_loss=loss * tokens)
        for role, loss in losses.items()
    }
    columns = {f"{role}_nll": np.full(300, loss * tokens) for role, loss in losses.items()}
    columns |= {f"{role}_exact_match": np.ones(300) for role in losses}
    decision = decide(evaluation(**models), GateConfig(**policy), Evidence(np.full(300, tokens), columns))
    assert decision.verdict == verdicts[tokens > 100]
    asked = rule(decision, "not_worse_than_champion")
    if asked.relative:
        assert asked.gain == pytest.approx(-0.03)
        assert asked.line == pytest.approx(1.0 + policy["worse_than_champion_by"])
        allowed = f"{policy['worse_than_champion_by'] * 100:.0f}"
        assert f"by 3.0 %; it may be worse by at most {allowed} % of production's" in asked.text


def test_relative_margins_want_a_metric_that_a_base_cannot_have_none_of() -> None:
    with pytest.raises(ValueError, match="relative to exact_match mean nothing"):
        GateConfig(metric="exact_match", margins="relative")
