"""A candidate that has moved too far from its base outside the domain is held for that."""

import hashlib
import math

import numpy as np
import pytest

from components.config import config_file
from components.config.gate import GateConfig
from components.gate.gate import replay, run_gate
from components.records import runs
from components.records.steps import Decision, Evaluation, TextLosses
from components.shared.errors import ConfigError, IntegrityError
from components.store.store import Store
from tests.components.config.loading import GOOD
from tests.components.gate.evidenced import as_parquet, decide, evaluation, evidence, model, rule

ANSWERS, TOKENS = 24, 50


def moved(by: np.ndarray | list[float]) -> TextLosses:
    """The base's answers as base and candidate read them; to the latter each token is so much less likely, in nats."""
    base = np.linspace(40.0, 140.0, len(by))
    nll = {"base": base.tolist(), "candidate": (base + TOKENS * np.asarray(by)).tolist()}
    answers = [[7] * TOKENS] * len(by)
    return TextLosses(text_sha256="0", tokens=[TOKENS] * len(by), nll=nll, asked_sha256="1", answers=answers)


def of(own: TextLosses | None) -> Evaluation:
    far = {role: own.above_base(role) if own else None for role in ("base", "candidate")}
    base = model(loss=9.0, kl_from_base=far["base"])
    measured = evaluation(model("v2", kl_from_base=far["candidate"]), base, model("v1"))
    return measured.model_copy(update={"own_answers": own})


def decided(own: TextLosses | None, policy: GateConfig | None = None) -> Decision:
    return decide(of(own), policy or GateConfig(kl_from_base_at_most=0.5))


def around(mean: float, error: float) -> np.ndarray:
    """Divergences of the answers with this mean, known to within this standard error."""
    values = np.random.default_rng(0).standard_normal(ANSWERS)
    return mean + error * math.sqrt(ANSWERS) * (values - values.mean()) / values.std(ddof=1)


# One-sided t bounds: the limit of 0.5 less or more than t(23; 95 %) = 1.71 standard errors away.
@pytest.mark.parametrize(
    ("divergence", "error", "verdict"),
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
def test_the_bound_of_the_divergence_decides(divergence: float, error: float, verdict: str) -> None:
    assert decided(moved(around(divergence, error))).verdict == verdict


def test_it_is_said_how_far_the_candidate_has_moved() -> None:
    decision = decided(moved([0.75] * ANSWERS))
    assert decision.verdict == "hold"
    assert decision.reasons == (
        "The candidate's KL divergence from the base is 0.750 nats per answer token on 24 of the base's own answers, "
        "between 0.750 and 0.750, each with 95 % confidence; it may be at most 0.5.",
    )
    found = rule(decision, "near_base")
    assert (found.field, found.metric, found.against) == ("gate.kl_from_base_at_most", "kl_from_base", "base")
    assert found.candidate == pytest.approx(0.75)
    assert (found.other, found.line) == (0.0, 0.5)
    assert found.bound_text == "at most 0.5"


def test_where_the_answers_do_not_tell_more_of_them_are_asked_for() -> None:
    (reason,) = decided(moved(around(0.4, 0.1))).reasons
    assert "between 0.2" in reason
    # (z(95 %) + z(80 %))^2 variance / distance^2, here 2.486^2 * 24 = 148.4, in tens.
    assert reason.endswith("That does not tell: about 150 answers would (evaluate.own_answers gave 24 of 48).")


def test_nothing_is_asked_by_default_and_what_was_not_measured_is_not_taken_for_granted() -> None:
    assert "near_base" not in {each.name for each in decided(moved([9.0] * ANSWERS), GateConfig()).rules}
    for own in (None, moved([0.0] * ANSWERS).model_copy(update={"nll": {"base": [40.0] * ANSWERS}})):
        decision = decided(own)
        assert decision.verdict == "hold"
        assert "KL divergence from the base was not measured" in decision.reasons[0]


def test_the_replay_decides_again_by_the_answers_that_were_kept(store: Store) -> None:
    config = config_file.loads(GOOD, ["gate.kl_from_base_at_most=0.5", "evaluate.own_answers=24"])
    measured = of(moved(around(0.6, 0.05)))
    records = as_parquet(evidence(measured))
    store.put(runs.run_key("r", runs.EVALUATION_RECORDS), records)
    runs.write(store, "r", measured.model_copy(update={"records_sha256": hashlib.sha256(records).hexdigest()}))
    assert run_gate(config, store, "r").verdict == "hold"
    assert replay(store, "r").is_same
    runs.write(store, "r", of(moved(around(0.61, 0.05))))  # other evidence than the decision was made of
    with pytest.raises(IntegrityError, match=r"evaluation\.json has sha256 .* it was changed since"):
        replay(store, "r")


def test_an_evaluation_without_answers_reads_and_hashes_as_before() -> None:
    before = decided(None, GateConfig())
    body = of(None).as_json()
    assert b'"own_answers":null' in body.replace(b" ", b"")
    older = Evaluation.from_json(body.replace(b'"own_answers"', b'"what_nobody_knows"'), "here")
    assert older.own_answers is None
    assert decide(older, GateConfig()).basis_sha256 == before.basis_sha256


def test_answers_that_decide_have_to_be_asked_for() -> None:
    policy = ["gate.kl_from_base_at_most=0.5"]
    assert config_file.loads(GOOD, [*policy, "evaluate.own_answers=24"]).gate.kl_from_base_at_most == 0.5
    with pytest.raises(ConfigError, match=r"gate\.kl_from_base_at_most asks for what evaluate\.own_answers 0 does not"):
        config_file.loads(GOOD, policy)
