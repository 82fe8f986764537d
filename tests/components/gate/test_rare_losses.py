"""What a mean over a few hundred records cannot know of."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from components.config.gate import GateConfig
from components.gate.comparisons import Compared, Evidence, few_get_much_worse, not_worse_than_champion
from components.gate.policy import LEGACY_POLICY
from components.records.steps import Decision, RuleResult
from components.shared.metrics import METRICS
from tests.components.gate.evidenced import TOKENS, decide, evaluation, evidence, model, rule

EQUAL = {"candidate": model("v2"), "base": model(loss=9.0), "champion": model("v1")}


def decided(records: int, much_worse: int = 0, groups: int | None = None, **policy: object) -> Decision:
    """The decision on a candidate like its champion, except for some records that lose two nats per token."""
    measured = evaluation(**EQUAL).model_copy(update={"records": records})
    found = evidence(measured)
    nll = found.columns["champion_nll"] + 2 * TOKENS * (np.arange(records) < much_worse)
    nll -= 2 * TOKENS * much_worse / records  # the mean stays as it was
    found = replace(found, columns={**found.columns, "candidate_nll": nll})
    if groups:
        found = replace(found, groups=np.arange(records) % groups)
    return decide(measured, GateConfig(**policy), found)


@pytest.mark.parametrize(
    ("policy", "least"),
    [
        ({}, 299),
        ({"worse_than_champion_by": 0.1}, 59),  # a twentieth at two nats a token
        ({"margins": "relative", "worse_than_champion_by": 0.2}, 29),  # a tenth: the champion's loss is 1
        ({"worse_than_champion_by": 0.005}, 299),
        ({"confidence": 0.99}, 459),
    ],
)
def test_as_many_records_are_asked_for_as_show_what_would_use_the_margin_up(policy, least):
    share = {59: 0.05, 29: 0.1}.get(least, 0.01)
    assert binom.cdf(0, least, share) <= 1 - policy.get("confidence", 0.95) < binom.cdf(0, least - 1, share)
    policy = {"min_records": 2, **policy}
    assert decided(least, **policy).promoted
    few = decided(least - 1, **policy)
    assert few.verdict == "cannot tell"
    assert rule(few, "much_worse").records_needed == least
    assert f"{least} records would tell (evaluate.records gave {least - 1})" in few.reasons[0]


def test_groups_count_and_not_their_records():
    assert decided(897, groups=299).promoted
    assert "298 groups" in decided(894, groups=298).reasons[0]


@pytest.mark.parametrize(("metric", "wanted"), [("loss", 299), ("token_f1", 149)])
def test_records_count_by_their_weight_in_the_metric(metric, wanted):
    """As many as a sample has whose answers are all of one length (Kish): here with two to ten tokens."""
    lengths = np.arange(450) % 9 + 2.0
    effective = [lengths[:n].sum() ** 2 / (lengths[:n] ** 2).sum() for n in range(1, 451)]
    least = wanted if metric != "loss" else next(n for n, each in enumerate(effective, 1) if each >= wanted)
    policy = GateConfig(metric=metric, better_than_base_by=-1.0)
    assert policy.records_to_replace() == wanted

    def of(records: int) -> Decision:
        measured = evaluation(**EQUAL).model_copy(update={"records": records})
        return decide(measured, policy, replace(evidence(measured), tokens=lengths[:records]))

    assert of(least).promoted
    few = of(least - 1)
    assert few.verdict == "cannot tell"
    assert rule(few, "much_worse").records_needed == pytest.approx(least, abs=2)


def test_right_and_wrong_need_no_such_rule():
    measured = evaluation(**EQUAL).model_copy(update={"records": 140})
    right = (np.arange(140) < 98).astype(float)
    found = evidence(measured)
    found = replace(found, columns={key: right if "exact" in key else each for key, each in found.columns.items()})
    decision = decide(measured, GateConfig(metric="exact_match", better_than_base_by=-1.0), found)
    assert decision.promoted
    assert not [each for each in decision.rules if each.name == "much_worse"]


@pytest.mark.slow
def test_a_candidate_with_rare_losses_is_seldom_promoted_where_answers_differ_in_length():
    """One record in a hundred loses two nats a token, by which the candidate is worse by the margin of 0.02. Of 2,000,
    2.4 % pass; with the bound of the mean alone, 8.0 %."""
    random, promoted, draws = np.random.default_rng(3), 0, 100
    for _ in range(draws):
        tokens = random.integers(2, 11, 370).astype(float)
        lost = np.where(random.random(370) < 0.01, 2.0, 0.05 * random.standard_normal(370))
        columns = {"champion_nll": tokens, "candidate_nll": tokens * (1 + lost)}
        models = {
            role: model(role, loss=float(columns[f"{role}_nll"].sum() / tokens.sum()))
            for role in ("champion", "candidate")
        }
        measured = evaluation(models["candidate"], None, models["champion"]).model_copy(update={"records": 370})
        compared = Compared(measured, Evidence(tokens, columns), METRICS["loss"], "champion", "production", 0.95)
        assert few_get_much_worse(GateConfig(), compared).passed
        promoted += not_worse_than_champion(GateConfig(), models["champion"], compared).passed
    assert promoted <= 0.045 * draws


@pytest.mark.parametrize(
    ("seen", "records", "verdict"), [(3, 300, "cannot tell"), (4, 1000, "promote"), (30, 300, "hold")]
)
def test_a_limit_of_its_own_bounds_the_records_that_are_much_worse(seen, records, verdict):
    """Three of 300 records are at most 2.6 % of all, thirty at least 7.3 %; four of 1,000 at most 0.9 % (SciPy)."""
    wide = {"worse_than_champion_by": 2.0, "guards": [], "slices": []}
    decision = decided(records, seen, much_worse_share=0.01, **wide)
    assert decision.verdict == verdict
    assert rule(decision, "much_worse").text.startswith(f"{seen} of {records:,} records lose more than 1.5 nats")
    unlimited = decided(records, seen, much_worse_share=1.0, **wide)
    assert not [each for each in unlimited.rules if each.name == "much_worse"]


def with_heavy_tail(**policy: object) -> RuleResult:
    """The rule's result for losses against the champion from a lognormal of sigma 1.5."""
    measured = evaluation(**EQUAL).model_copy(update={"records": 1000})
    found = evidence(measured)
    lost = TOKENS * np.random.default_rng(2).lognormal(-4, 1.5, 1000)
    found = replace(found, columns={**found.columns, "candidate_nll": found.columns["champion_nll"] + lost})
    return rule(decide(measured, GateConfig(**policy), found), "not_worse_than_champion")


def test_a_bound_leaves_room_for_what_the_tail_costs_beyond_the_records_drawn():
    as_drawn = with_heavy_tail(much_worse_share=1.0)
    assert as_drawn.unseen is None
    unseen = with_heavy_tail().unseen
    assert 0 < unseen < 2 * (as_drawn.upper - as_drawn.lower)
    between = -as_drawn.lower + unseen / 2  # within the bound, and not by as much as that
    assert with_heavy_tail(worse_than_champion_by=between, much_worse_share=1.0).passed
    short = with_heavy_tail(worse_than_champion_by=between)
    assert short.undecided
    assert "beyond those drawn they are expected to cost" in short.text
    assert with_heavy_tail(worse_than_champion_by=between + unseen).passed


def test_a_decision_from_before_the_rule_is_repeated_without_it():
    policy = GateConfig(much_worse_share=1.0)
    measured = evaluation(**EQUAL).model_copy(update={"records": 100})
    then = decide(measured, policy)
    recorded = {key: value for key, value in then.policy.items() if not key.startswith("much_worse")}
    again = decide(measured, GateConfig.model_validate({**LEGACY_POLICY, **recorded}))
    assert (again.verdict, again.basis_sha256) == (then.verdict, then.basis_sha256) == ("promote", then.basis_sha256)
    assert decide(measured, GateConfig()).basis_sha256 != then.basis_sha256
