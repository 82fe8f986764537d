"""What the gate makes of bounds: of records that differ, go together, or are too few."""

import math
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pytest

from components.config.gate import GateConfig, Guard
from components.config.section import Added
from components.gate.comparisons import Evidence
from components.records.steps import Decision, Evaluation
from components.registry.event_log import confidence_at
from tests.components.gate.evidenced import decide, evaluation, evidence, model, rule


def spread(measured: Evaluation, **of_records: Any) -> Evidence:
    """Evidence whose columns are given, about the numbers of the evaluation."""
    found = evidence(measured)
    return replace(found, columns={**found.columns, **of_records})


def around(mean: float, deviation: float, records: int = 300) -> np.ndarray:
    """Losses of records of four tokens, with this mean and standard deviation per token."""
    values = np.random.default_rng(0).standard_normal(records)
    return 4 * (mean + deviation * (values - values.mean()) / values.std(ddof=1))


# One-sided t bounds: the margin of 0.02 less or more than t(299; 95 %) = 1.65 standard errors away from the gain.
@pytest.mark.parametrize(
    ("gain", "error", "verdict"),
    [
        (0.0, 0.0110, "promote"),
        (0.0, 0.0135, "cannot tell"),
        (-0.01, 0.0055, "promote"),
        (-0.01, 0.0070, "cannot tell"),
        (-0.03, 0.0070, "cannot tell"),
        (-0.03, 0.0055, "hold"),
    ],
)
def test_the_bound_decides_and_not_the_gain(gain: float, error: float, verdict: str) -> None:
    measured = evaluation(model("v2", loss=1.0 - gain), model(loss=9.0), model("v1"))
    records = spread(measured, candidate_nll=around(1.0 - gain, error * math.sqrt(300)))
    decision = decide(measured, GateConfig(), records)
    assert decision.verdict == verdict
    assert decision.decision == ("promote" if verdict == "promote" else "hold")
    found = rule(decision, "not_worse_than_champion")
    assert (found.passed, found.undecided) == (verdict == "promote", verdict == "cannot tell")
    assert found.lower == pytest.approx(gain - 1.65 * error, abs=0.1 * error)
    assert found.upper == pytest.approx(gain + 1.65 * error, abs=0.1 * error)


def test_what_cannot_be_told_says_how_many_records_would_tell() -> None:
    measured = evaluation(model("v2"), model(loss=9.0), model("v1")).model_copy(update={"held_out": 420})
    records = spread(measured, candidate_nll=around(1.0, 0.02 * math.sqrt(300)))
    decision = decide(measured, GateConfig(), records)
    found = rule(decision, "not_worse_than_champion")
    assert decision.reasons == (found.text,)
    # The usual formula for a mean: (z(95 %) + z(80 %))^2 variance / distance^2, here 2.486^2 * 300.
    assert found.records_needed == 1860
    assert "about 1860 held-out records would (evaluate.records gave 300, and the dataset holds out 420)" in found.text


def test_models_that_differ_on_one_record_have_no_bound_and_no_number_of_records_that_would_tell() -> None:
    ours, theirs = np.append(np.ones(299), 0.0), np.ones(300)
    measured = evaluation(
        model("v2", token_f1=float(ours.mean())), model(token_f1=0.0), model("v1", token_f1=float(theirs.mean()))
    )
    records = spread(measured, candidate_token_f1=ours * 0.9 + 0.1, champion_token_f1=theirs, base_token_f1=0 * theirs)
    found = rule(decide(measured, GateConfig(metric="token_f1"), records), "not_worse_than_champion")
    assert found.undecided
    assert found.records_needed is None
    assert "the gain lies below +0.0 points, with 95 % confidence." in found.text
    assert "the two differ on too few of the held-out records (evaluate.records gave 300)" in found.text


def test_too_few_records_decide_nothing() -> None:
    measured = evaluation(model("v2"), model(loss=2.0)).model_copy(update={"records": 29})
    decision = decide(measured, GateConfig())
    assert (decision.verdict, decision.decision) == ("cannot tell", "hold")
    assert "compared on 29 records, and at least 30 are asked for" in decision.reasons[0]
    assert decide(measured, GateConfig(min_records=29)).promoted


def test_records_that_go_together_count_as_one() -> None:
    measured = evaluation(model("v2"), model(loss=9.0), model("v1"))
    records = spread(measured, candidate_nll=np.repeat(around(1.0, 0.15, 100), 3))
    assert decide(measured, GateConfig(), records).promoted
    grouped = replace(records, groups=np.repeat(np.arange(100), 3))
    assert decide(measured, GateConfig(), grouped).verdict == "cannot tell"
    few = decide(measured, GateConfig(min_records=101), grouped)
    assert few.reasons[0].startswith("The models were compared on 100 groups of records")


def right(*counts: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Marks of candidate and champion: (records, candidate's mark, champion's mark)."""
    ours, theirs = (
        np.concatenate([np.full(count, float(mark)) for count, mark in pairs])
        for pairs in zip(*[((n, a), (n, b)) for n, a, b in counts], strict=True)
    )
    return ours, theirs


# McNemar's exact test, one-sided: of 22 records that differ, 16 lost have a chance of 0.0262 and 14 of 0.143.
@pytest.mark.parametrize(("lost", "won", "verdict"), [(16, 6, "hold"), (14, 8, "promote"), (216, 0, "hold")])
def test_exact_match_must_not_be_shown_to_fall_whatever_the_loss_says(lost: int, won: int, verdict: str) -> None:
    ours, theirs = right((lost, 0, 1), (won, 1, 0), (300 - lost - won, 1, 1))
    measured = evaluation(model("v2", exact_match=ours.mean()), model(loss=9.0), model("v1", exact_match=theirs.mean()))
    decision = decide(measured, GateConfig(), spread(measured, candidate_exact_match=ours, champion_exact_match=theirs))
    assert decision.verdict == verdict
    if verdict == "hold":
        assert f"right on {won} records, and production alone on {lost}" in decision.reasons[0]


# R's contingencytables 3.1 prints -0.1240 as the lower end of Tango's 95 % interval of this table (cavo_2012).
@pytest.mark.parametrize(("margin", "verdict"), [(0.125, "promote"), (0.123, "cannot tell"), (0.005, "hold")])
def test_a_guard_with_a_margin_asks_for_a_bound(margin: float, verdict: str) -> None:
    ours, theirs = right((16, 0, 1), (6, 1, 0), (59, 1, 1), (80, 0, 0))
    measured = evaluation(
        model("v2", exact_match=ours.mean()), model(loss=9.0), model("v1", exact_match=theirs.mean())
    ).model_copy(update={"records": 161})
    records = spread(measured, candidate_exact_match=ours, champion_exact_match=theirs)
    guards = [Guard(metric="exact_match", worse_than_champion_by=margin)]
    policy = GateConfig(confidence=0.975, guards=guards, much_worse_share=1.0)
    assert decide(measured, policy, records).verdict == verdict


def test_the_candidate_is_held_to_the_best_version_so_far_and_not_to_its_champion_alone() -> None:
    models = {"base": model(loss=9.0), "champion": model("v4", loss=1.04), "anchor": model("v1", loss=1.0)}

    def decided(loss: float) -> Decision:
        measured = Evaluation(run_id="r", records=300, models={**models, "candidate": model("v5", loss=loss)})
        return decide(measured, GateConfig())

    assert decided(1.05).verdict == "promote"
    fallen = decided(1.055)
    assert fallen.verdict == "hold"
    assert "worse than the best version's 1.000 by 0.055; it may be worse by at most 0.05" in fallen.reasons[0]
    assert "The best version so far is v1" in fallen.reasons[0]
    assert (decided(1.03).anchor, decided(0.99).anchor) == ("v1", "v5")


def test_a_version_is_the_best_only_where_that_is_sure() -> None:
    measured = evaluation(model("v2", loss=0.99), model(loss=9.0), model("v1"))
    sure, unsure = (spread(measured, candidate_nll=around(0.99, error * math.sqrt(300))) for error in (0.003, 0.009))
    decisions = [decide(measured, GateConfig(), records) for records in (sure, unsure)]
    assert [(each.verdict, each.anchor) for each in decisions] == [("promote", "v2"), ("promote", "v1")]
    assert decide(evaluation(model("v2"), model(loss=9.0)), GateConfig()).anchor == "v2"


def test_each_further_look_at_a_test_set_has_to_be_surer() -> None:
    spent = [1 - confidence_at(look, 0.95) for look in range(1, 1001)]
    assert spent[:3] == pytest.approx([0.05 / 2, 0.05 / 6, 0.05 / 12])
    assert sum(spent) == pytest.approx(0.05, rel=2e-3)
    assert sum(spent) < 0.05
    measured = evaluation(model("v2"), model(loss=9.0), model("v1")).model_copy(update={"test_set": ("a",)})
    records = spread(measured, candidate_nll=around(1.0, 0.0115 * math.sqrt(300)))
    policy = GateConfig(worse_than_best_by=0.04)
    found = [decide(measured, policy, records, look=look) for look in (1, 30)]
    assert [each.verdict for each in found] == ["promote", "cannot tell"]  # 3.5 errors: enough for one look, not for 30
    assert "this is decision 30 on this test set" in found[1].reasons[0]
    after_many = decide(measured, policy, records, look=30, passed_before=24)
    assert after_many.promoted
    assert rule(after_many, "not_worse_than_best").confidence == pytest.approx(1 - 0.05 * 24 / 930)


class GateConfigToCome(GateConfig):
    """The gate's section in a later release, with one key more."""

    rule_to_come: Annotated[float | None, Added("9.0.0")] = None


def test_a_rule_that_a_later_release_adds_and_nobody_asked_for_changes_no_basis() -> None:
    measured = evaluation(model("v2"), model(loss=2.0))
    before = decide(measured, GateConfig())
    policy = GateConfigToCome.model_validate(before.policy)
    assert decide(measured, policy).basis_sha256 == before.basis_sha256
    asked = policy.model_copy(update={"rule_to_come": 0.1})
    assert decide(measured, asked).basis_sha256 != before.basis_sha256


def test_the_same_evidence_gives_the_same_basis_and_any_other_another() -> None:
    measured = evaluation(model("v2"), model(loss=2.0)).model_copy(update={"records_sha256": "1" * 64})
    first = decide(measured, GateConfig())
    assert decide(measured, GateConfig()).basis_sha256 == first.basis_sha256
    others = [
        decide(measured, GateConfig(confidence=0.9)),
        decide(measured.model_copy(update={"records_sha256": "2" * 64}), GateConfig()),
        decide(measured.model_copy(update={"base": {"reference": "another"}}), GateConfig()),
        decide(evaluation(model("v3"), model(loss=2.0)), GateConfig()),
    ]
    assert len({first.basis_sha256, *(each.basis_sha256 for each in others)}) == 5
