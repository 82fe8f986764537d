"""A candidate that forgets what its base knows is held for that, whatever it has gained on its task."""

import math

import numpy as np
import pytest

from components.config.gate import GateConfig
from components.records.steps import Decision, TextLosses
from components.shared.metrics import METRICS
from tests.components.gate.evidenced import decide, evaluation, evidence, model, rule

PASSAGES, TOKENS = 64, 100


def read(candidate: np.ndarray | list[float], base: float = 3.0) -> TextLosses:
    """The general text as base and candidate find it, in nats per token of each passage."""
    nll = {"base": [base * TOKENS] * len(candidate), "candidate": [float(loss) * TOKENS for loss in candidate]}
    return TextLosses(text_sha256="0", tokens=[TOKENS] * len(candidate), nll=nll)


def decided(text: TextLosses | None, policy: GateConfig | None = None) -> Decision:
    losses = {role: text.loss(role) if text else None for role in ("base", "candidate")}
    measured = evaluation(
        model("v2", general_loss=losses["candidate"]), model(loss=9.0, general_loss=losses["base"]), model("v1")
    ).model_copy(update={"general_text": text})
    return decide(measured, policy or GateConfig(worse_on_general_text_by=0.5))


def around(mean: float, error: float) -> np.ndarray:
    """Losses of the passages with this mean, known to within this standard error."""
    values = np.random.default_rng(0).standard_normal(PASSAGES)
    return mean + error * math.sqrt(PASSAGES) * (values - values.mean()) / values.std(ddof=1)


# One-sided t bounds: the margin of 0.5 less or more than t(63; 95 %) = 1.67 standard errors away.
@pytest.mark.parametrize(
    ("loss", "error", "verdict"),
    [
        (2.9, 0.0, "promote"),
        (3.5, 0.0, "promote"),
        (3.51, 0.0, "hold"),
        (3.4, 0.055, "promote"),
        (3.4, 0.070, "cannot tell"),
        (3.6, 0.070, "cannot tell"),
        (3.6, 0.055, "hold"),
    ],
)
def test_the_bound_of_what_is_forgotten_decides(loss: float, error: float, verdict: str) -> None:
    assert decided(read(around(loss, error))).verdict == verdict


def test_it_is_said_what_was_forgotten() -> None:
    decision = decided(read([3.75] * PASSAGES))
    assert decision.verdict == "hold"
    (reason,) = decision.reasons
    assert reason.startswith(
        "The candidate's loss on general text of 3.750 nats per token is worse than the base model's 3.000 by 0.750; "
        "it may be worse by at most 0.5."
    )
    found = rule(decision, "remembers")
    assert (found.field, found.metric, found.against) == ("gate.worse_on_general_text_by", "general_loss", "base")
    assert (found.candidate, found.other, found.line) == (3.75, 3.0, 3.5)


def test_where_the_passages_do_not_tell_more_of_them_are_asked_for() -> None:
    (reason,) = decided(read(around(3.4, 0.1))).reasons
    # (z(95 %) + z(80 %))^2 variance / distance^2, here 2.486^2 * 64.
    assert reason.endswith("That does not tell: about 400 passages would (evaluate.general_passages gave 64 of 240).")


def test_the_margin_is_the_configs() -> None:
    assert decided(read([3.6] * PASSAGES), GateConfig(worse_on_general_text_by=0.7)).promoted
    assert not decided(read([3.1] * PASSAGES), GateConfig(worse_on_general_text_by=0)).promoted


def test_nothing_is_asked_by_default() -> None:
    decision = decided(read([9.0] * PASSAGES), GateConfig())
    assert decision.promoted
    assert "remembers" not in {each.name for each in decision.rules}


def test_what_was_not_read_is_not_taken_for_granted() -> None:
    decision = decided(None)
    assert decision.verdict == "hold"
    assert "loss on general text was not measured" in decision.reasons[0]


def test_an_unread_candidate_fails_and_held_out_records_never_stand_in_for_passages() -> None:
    text = read([3.0] * PASSAGES).model_copy(update={"nll": {"base": [300.0] * PASSAGES}})
    decision = decided(text)
    assert decision.verdict == "hold"
    assert "loss on general text was not measured" in decision.reasons[0]
    without = evidence(evaluation(model("v2"), model()))
    assert without.pairs(METRICS["loss"], "base") is not None
    assert without.pairs(METRICS["general_loss"], "base") is None


def test_what_was_read_is_part_of_what_the_verdict_follows_from() -> None:
    one, other = decided(read([3.0] * PASSAGES)), decided(read([3.01] * PASSAGES))
    assert (one.verdict, other.verdict) == ("promote", "promote")
    assert one.basis_sha256 != other.basis_sha256
