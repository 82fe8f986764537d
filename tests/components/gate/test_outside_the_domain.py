"""A candidate that forgets what its base knows, or moves too far from what it answers, is held for that."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest

from components.config import config_file
from components.config.gate import GateConfig
from components.gate.gate import replay, run_gate
from components.records import runs
from components.records.steps import Decision, Evaluation, TextLosses
from components.shared.errors import ConfigError
from components.shared.metrics import METRICS
from components.store.store import Store
from tests.components.config.loading import GOOD
from tests.components.gate.evidenced import as_parquet, decide, evaluation, evidence, model, rule

PASSAGES, ANSWERS, TOKENS = 64, 24, 50
FORGETS, MOVES = GateConfig(worse_on_general_text_by=0.5), GateConfig(kl_from_base_at_most=0.5)


def texts(above: np.ndarray | list[float], **changes: Any) -> TextLosses:
    """Texts of which each token costs the candidate so much more than the base, in nats."""
    base = np.linspace(100.0, 200.0, len(above))
    nll = {"base": base.tolist(), "candidate": (base + TOKENS * np.asarray(above)).tolist()}
    return TextLosses(**{"text_sha256": "0", "tokens": [TOKENS] * len(above), "nll": nll, **changes})


def of(general: TextLosses | None = None, own: TextLosses | None = None) -> Evaluation:
    models = [
        model(
            version,
            loss=loss,
            general_loss=general.loss(role) if general else None,  # type: ignore[arg-type]
            kl_from_base=own.above_base(role) if own else None,  # type: ignore[arg-type]
        )
        for role, version, loss in (("candidate", "v2", 1.0), ("base", None, 9.0))
    ]
    return evaluation(*models, model("v1")).model_copy(update={"general_text": general, "own_answers": own})


def around(mean: float, error: float, number: int) -> np.ndarray:
    """Values with this mean, known to within this standard error."""
    values = np.random.default_rng(0).standard_normal(number)
    return mean + error * math.sqrt(number) * (values - values.mean()) / values.std(ddof=1)


# One-sided t bounds: the line of 0.5 less or more than t(63; 95 %) = 1.67, or t(23; 95 %) = 1.71, errors away.
@pytest.mark.parametrize(
    ("above", "error", "verdict"),
    [
        (-0.1, 0.0, "promote"),
        (0.5, 0.0, "promote"),
        (0.51, 0.0, "hold"),
        (0.4, 0.050, "promote"),
        (0.4, 0.075, "cannot tell"),
        (0.6, 0.075, "cannot tell"),
        (0.6, 0.050, "hold"),
    ],
)
def test_the_bound_decides(above: float, error: float, verdict: str) -> None:
    assert decide(of(texts(around(above, error, PASSAGES))), FORGETS).verdict == verdict
    assert decide(of(own=texts(around(above, error, ANSWERS))), MOVES).verdict == verdict


def test_the_rules_name_their_field_their_metric_and_their_line() -> None:
    policy = GateConfig(worse_on_general_text_by=0.5, kl_from_base_at_most=0.5)
    decision = decide(of(texts([0.75] * PASSAGES), texts([0.75] * ANSWERS)), policy)
    remembers, near_base = rule(decision, "remembers"), rule(decision, "near_base")
    assert decision.reasons == (remembers.text, near_base.text)
    assert (remembers.field, remembers.metric) == ("gate.worse_on_general_text_by", "general_loss")
    assert (remembers.candidate, remembers.other, remembers.line) == pytest.approx((3.75, 3.0, 3.5))
    assert (near_base.field, near_base.metric) == ("gate.kl_from_base_at_most", "kl_from_base")
    assert (near_base.candidate, near_base.other, near_base.line) == (pytest.approx(0.75), 0.0, 0.5)
    assert remembers.against == near_base.against == "base"


def test_where_the_texts_do_not_tell_more_of_them_are_asked_for() -> None:
    # (z(95 %) + z(80 %))^2 variance / distance^2, here 2.486^2 * 64, and 2.486^2 * 24 = 148.4, in tens.
    (reason,) = decide(of(texts(around(0.4, 0.1, PASSAGES))), FORGETS).reasons
    assert reason.endswith("That does not tell: about 400 passages would (evaluate.general_passages gave 64 of 240).")
    (reason,) = decide(of(own=texts(around(0.4, 0.1, ANSWERS))), MOVES).reasons
    assert reason.endswith("That does not tell: about 150 answers would (evaluate.own_answers gave 24 of 48).")


def test_a_policy_without_a_margin_asks_for_nothing() -> None:
    decision = decide(of(texts([9.0] * PASSAGES), texts([9.0] * ANSWERS)), GateConfig())
    assert decision.promoted
    assert not {"remembers", "near_base"} & {each.name for each in decision.rules}
    assert not decide(of(texts([0.1] * PASSAGES)), GateConfig(worse_on_general_text_by=0)).promoted


def test_where_no_limit_is_set_half_a_nat_is_one_and_decisions_from_before_that_stay_what_they_are(
    store: Store,
) -> None:
    config = config_file.loads(GOOD)

    def decided(run_id: str, above: float, base: float) -> Decision:
        nll = {"base": [base * TOKENS] * PASSAGES, "candidate": [(base + above) * TOKENS] * PASSAGES}
        general = texts([above] * PASSAGES, nll=nll)
        measured = of(general).model_copy(update={"run_id": run_id})
        records = as_parquet(evidence(measured))
        store.put(runs.run_key(run_id, runs.EVALUATION_RECORDS), records)
        runs.write(store, run_id, measured.model_copy(update={"records_sha256": hashlib.sha256(records).hexdigest()}))
        return run_gate(config, store, run_id)

    assert decided("kept", 0.4, 3.7).promoted
    forgetful = decided("forgot", 1.0, 3.7)
    assert (forgetful.verdict, rule(forgetful, "remembers").bound) == ("hold", 0.5)
    assert replay(store, "forgot").is_same
    assert decided("foreign", 1.0, 5.1).promoted  # a base that does not know these languages
    measured = runs.read(store, "forgot", Evaluation).model_copy(update={"run_id": "before"})
    before = decide(measured, config.gate)  # as a release decided that had no limit of its own
    assert before.promoted
    store.put(
        runs.run_key("before", runs.EVALUATION_RECORDS), store.get(runs.run_key("forgot", runs.EVALUATION_RECORDS))
    )
    runs.write(store, "before", measured)
    runs.write(store, "before", before)
    assert replay(store, "before").is_same


@pytest.mark.parametrize(
    ("policy", "words"),
    [(FORGETS, "loss on general text was not measured"), (MOVES, "KL divergence from the base was not measured")],
)
def test_what_was_not_measured_is_not_taken_for_granted(policy: GateConfig, words: str) -> None:
    unread = texts([0.0] * ANSWERS, nll={"base": [40.0] * ANSWERS})
    for measured in (of(), of(unread, unread)):
        decision: Decision = decide(measured, policy)
        assert decision.verdict == "hold"
        assert words in decision.reasons[0]
    without = evidence(of())
    assert without.pairs(METRICS["loss"], "base") is not None
    assert without.pairs(METRICS["general_loss"], "base") is None  # nor do held-out records stand in for texts


def test_what_was_read_is_part_of_what_the_verdict_follows_from_and_without_it_nothing_changes() -> None:
    bases = {
        decide(measured, GateConfig()).basis_sha256
        for measured in (of(), of(texts([0.0])), of(texts([0.01])), of(own=texts([0.0])))
    }
    assert len(bases) == 4
    older = Evaluation.from_json(of().as_json().replace(b'"own_answers"', b'"what_nobody_knows"'), "here")
    assert decide(older, GateConfig()).basis_sha256 in bases


def test_answers_that_decide_have_to_be_asked_for() -> None:
    policy = ["gate.kl_from_base_at_most=0.5"]
    assert config_file.loads(GOOD, [*policy, "evaluate.own_answers=24"]).gate.kl_from_base_at_most == 0.5
    with pytest.raises(ConfigError, match=r"gate\.kl_from_base_at_most asks for what evaluate\.own_answers 0 does not"):
        config_file.loads(GOOD, policy)
