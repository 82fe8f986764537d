import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from components.config.schema import AdapterConfig, GateConfig, Guard, Limit
from components.gate import policy as policy_of_the_gate
from components.gate.evidence import Evidence
from components.gate.past import confidence_at
from components.registry.records import Decision, Evaluation, Measured, RuleResult
from components.shared.errors import DataError
from tests.components.gate.evidenced import evidence

GOOD = {"loss": 1.0, "perplexity": 2.72, "exact_match": 0.70, "token_f1": 0.75, "prompt_gain": 1.2}


def model(version: str | None = None, **metrics: float | None) -> Measured:
    return Measured(version=version, metrics={**GOOD, **metrics})


def evaluation(candidate: Measured | None, base: Measured | None, champion: Measured | None = None) -> Evaluation:
    models = {"base": base, "champion": champion, "candidate": candidate}
    return Evaluation(run_id="r", records=300, models=models)


def decide(measured: Evaluation, policy: GateConfig, records: Evidence | None = None) -> Decision:
    nll_from = "perplexity" if policy.metric == "perplexity" else "loss"
    found = records or evidence(measured, nll_from=nll_from)
    return policy_of_the_gate.decide(measured, found, policy, AdapterConfig(name="icd10"))


def rule(decision: Decision, name: str) -> RuleResult:
    return next(each for each in decision.rules if each.name == name)


def without_limits(**settings: Any) -> GateConfig:
    return GateConfig(limits=[], **settings)


@pytest.mark.parametrize(
    ("metric", "base", "margin", "candidate", "passed"),
    [
        ("loss", 0.30, 0.05, 0.2499, True),
        ("loss", 0.30, 0.05, 0.25, True),  # 0.30 - 0.25 is less than 0.05 in binary
        ("loss", 0.30, 0.05, 0.2501, False),
        ("perplexity", 10.0, 1.5, 8.5, True),
        ("perplexity", 10.0, 1.5, 8.51, False),
        ("exact_match", 0.10, 0.2, 0.30, True),
        ("exact_match", 0.10, 0.2, 0.2999, False),
        ("token_f1", 0.10, 0.2, 0.30, True),
        ("token_f1", 0.10, 0.2, 0.2999, False),
        ("loss", 1.0, 0.0, 1.0, True),
        ("loss", 1.0, 0.0, 1.0001, False),
        ("loss", 1.0, -0.5, 1.5, True),
        ("loss", 1.0, -0.5, 1.51, False),
    ],
)
def test_candidate_must_be_better_than_base_by_at_least_the_margin(
    metric: Any, base: float, margin: float, candidate: float, passed: bool
) -> None:
    policy = without_limits(metric=metric, better_than_base_by=margin)
    decision = decide(evaluation(model("v2", **{metric: candidate}), model(**{metric: base})), policy)
    assert rule(decision, "better_than_base").passed is passed
    assert decision.promoted is passed


@pytest.mark.parametrize(
    ("metric", "champion", "tolerance", "candidate", "passed"),
    [
        ("loss", 0.50, 0.02, 0.40, True),
        ("loss", 0.50, 0.02, 0.52, True),
        ("loss", 0.50, 0.02, 0.5201, False),
        ("loss", 0.50, 0.0, 0.50, True),
        ("loss", 0.50, 0.0, 0.5001, False),
        ("perplexity", 2.0, 0.1, 2.1, True),
        ("perplexity", 2.0, 0.1, 2.11, False),
        ("exact_match", 0.70, 0.1, 0.60, True),
        ("exact_match", 0.70, 0.1, 0.5999, False),
        ("token_f1", 0.70, 0.1, 0.60, True),
        ("token_f1", 0.70, 0.1, 0.5999, False),
    ],
)
def test_candidate_may_be_worse_than_champion_by_at_most_the_tolerance(
    metric: Any, champion: float, tolerance: float, candidate: float, passed: bool
) -> None:
    policy = without_limits(metric=metric, better_than_base_by=-100.0, worse_than_champion_by=tolerance)
    decision = decide(
        evaluation(model("v2", **{metric: candidate}), model(), model("v1", **{metric: champion})), policy
    )
    assert rule(decision, "not_worse_than_champion").passed is passed
    assert decision.promoted is passed


@pytest.mark.parametrize(
    ("metric", "bounds", "candidate", "passed"),
    [
        ("loss", {"max": 1.5}, 1.5, True),
        ("loss", {"max": 1.5}, 1.5001, False),
        ("perplexity", {"max": 4.0}, 4.0, True),
        ("perplexity", {"max": 4.0}, 4.0001, False),
        ("exact_match", {"min": 0.6}, 0.6, True),
        ("exact_match", {"min": 0.6}, 0.5999, False),
        ("exact_match", {"min": 0.6, "max": 0.9}, 0.95, False),
        ("token_f1", {"min": 0.6}, 0.6, True),
        ("token_f1", {"min": 0.6}, 0.5999, False),
        ("prompt_gain", {"min": 0.1}, 0.1, True),
        ("prompt_gain", {"min": 0.1}, 0.0999, False),
        ("prompt_gain", {"min": 0.1}, -0.2, False),
    ],
)
def test_limits_include_their_bound(metric: Any, bounds: dict[str, float], candidate: float, passed: bool) -> None:
    policy = GateConfig(better_than_base_by=-100.0, limits=[Limit(metric=metric, **bounds)])
    assert decide(evaluation(model("v2", **{metric: candidate}), model()), policy).promoted is passed


def test_each_bound_of_each_limit_is_a_rule_that_names_its_field() -> None:
    policy = GateConfig(
        limits=[Limit(metric="prompt_gain", min=0.1), Limit(metric="exact_match", min=0.5, max=0.9)],
    )
    decision = decide(evaluation(model("v2", exact_match=0.4), model(loss=2.0)), policy)
    assert [(each.field, each.bound, each.passed) for each in decision.rules[2:]] == [
        ("gate.limits[0].min", 0.1, True),
        ("gate.limits[1].min", 0.5, False),
        ("gate.limits[1].max", 0.9, True),
    ]
    assert decision.reasons == ("The candidate's exact match of 40.0 % is below the limit: at least 50 % is required.",)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["candidate", "base", "champion"])
def test_a_number_that_is_missing_or_not_finite_holds(name: str, value: Any) -> None:
    models = {"candidate": model("v2"), "base": model(loss=2.0), "champion": model("v1")}
    assert decide(evaluation(**models), GateConfig()).promoted
    models[name] = model(models[name].version, loss=value)
    decision = decide(evaluation(**models), GateConfig())
    assert decision.decision == "hold"
    who = {"champion": "production version", "base": "base model"}.get(name, name)
    assert any(who in reason and "cannot be checked" in reason for reason in decision.reasons)
    json.loads(decision.as_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_an_unmeasured_limit_holds(value: Any) -> None:
    decision = decide(evaluation(model("v2", prompt_gain=value), model(loss=2.0)), GateConfig())
    assert decision.decision == "hold"
    assert rule(decision, "limit_min").passed is False


def test_a_metric_that_no_rule_compares_must_still_be_sound() -> None:
    decision = decide(evaluation(model("v2", token_f1=math.nan), model(loss=2.0)), GateConfig())
    assert decision.decision == "hold"
    assert "token F1 is nan" in decision.reasons[0]


def test_a_metric_that_no_rule_compares_may_be_absent() -> None:
    assert decide(evaluation(model("v2", token_f1=None), model(loss=2.0)), GateConfig()).promoted


def test_the_champion_itself_is_held_because_nothing_changed() -> None:
    decision = decide(evaluation(model("v1"), model(loss=2.0), model("v1")), GateConfig())
    assert decision.decision == "hold"
    assert decision.reasons == (
        "Nothing changed: the candidate is v1, the very version that production points to now.",
    )


def test_without_a_champion_the_rule_passes_and_says_so() -> None:
    decision = decide(evaluation(model("v2"), model(loss=2.0)), GateConfig())
    assert decision.promoted
    assert decision.champion is None
    assert rule(decision, "not_worse_than_champion").text.startswith("The alias production points to no version yet")


def test_reasons_are_every_rule_when_promoted_and_the_failed_ones_when_held() -> None:
    promoted = decide(evaluation(model("v2"), model(loss=2.0), model("v1", loss=1.1)), GateConfig())
    assert promoted.reasons == tuple(each.text for each in promoted.rules)
    held = decide(evaluation(model("v2"), model(loss=2.0), model("v1", loss=0.9)), GateConfig())
    assert held.reasons == (rule(held, "not_worse_than_champion").text,)
    assert held.reasons == (
        "The candidate's loss of 1.000 nats per answer token is worse than production's 0.900 by 0.100; "
        "it may be worse by at most 0.02. Record by record (300 of them), the gain lies between −0.100 and −0.100, "  # noqa: RUF001
        "each with 95 % confidence.",
    )


def test_a_low_prompt_gain_is_explained() -> None:
    decision = decide(evaluation(model("v2", prompt_gain=0.01), model(loss=2.0)), GateConfig())
    assert decision.reasons == (
        "Answers do not depend on their prompts: seeing its own prompt instead of another record's helps by 0.010 nats "
        "per answer token; at least 0.1 is required. Are prompts and answers shuffled or mislabelled in the data?",
    )


def test_numbers_that_would_look_equal_are_shown_apart() -> None:
    decision = decide(evaluation(model("v2", loss=1.0), model(loss=1.04996)), GateConfig())
    assert "by 0.04996; it has to be better by at least 0.05." in decision.reasons[0]


def test_shares_are_told_in_per_cent_and_points() -> None:
    policy = without_limits(metric="exact_match", better_than_base_by=0.05)
    text = decide(evaluation(model("v2", exact_match=0.72), model(exact_match=0.02)), policy).reasons[0]
    assert text == (
        "The candidate's exact match of 72.0 % is better than the base model's 2.0 % by 70.0 points; "
        "it has to be better by at least 5 points. Record by record (300 of them), the gain lies between +70.0 points "
        "and +70.0 points, each with 95 % confidence."
    )


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
        (0.10, 0.0700, "promote"),
        (0.10, 0.0800, "cannot tell"),
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
    assert found.text.endswith(
        "That does not tell: about 1860 held-out records would (evaluate.records gave 300, and the dataset holds out "
        "420)."
    )


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
    assert (
        decide(measured, GateConfig(min_records=101), grouped)
        .reasons[0]
        .startswith("The models were compared on 100 groups of records")
    )


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
    policy = GateConfig(confidence=0.975, guards=[Guard(metric="exact_match", worse_than_champion_by=margin)])
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
    found = [
        policy_of_the_gate.decide(measured, records, policy, AdapterConfig(name="icd10"), look=look) for look in (1, 30)
    ]
    assert [each.verdict for each in found] == ["promote", "cannot tell"]  # 3.5 errors: enough for one look, not for 30
    assert "this is decision 30 on this test set" in found[1].reasons[0]


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


@pytest.mark.parametrize("absent", ["candidate", "base"])
def test_an_evaluation_without_a_model_is_refused(absent: str) -> None:
    models = {"candidate": model("v2"), "base": model(loss=2.0), absent: None}
    with pytest.raises(DataError, match=absent):
        decide(evaluation(**models), GateConfig())


def test_each_rule_words_itself_and_draws_its_line_where_it_binds() -> None:
    policy = GateConfig(limits=[Limit(metric="prompt_gain", min=0.1), Limit(metric="exact_match", max=0.9)])
    decision = decide(evaluation(model("v2"), model(loss=2.0), model("v1", loss=1.1)), policy)
    assert [(each.title, each.bound_text, each.against, each.line, each.line_text) for each in decision.rules] == [
        ("Is a new version", "", None, None, ""),
        (
            "Loss better than the base model's",
            "better by at least 0.05",
            "base",
            pytest.approx(1.95),
            "at most 1.950, to beat the base",
        ),
        (
            "Loss not worse than production's",
            "worse by at most 0.02",
            "champion",
            pytest.approx(1.12),
            "at most 1.120, not to fall behind production",
        ),
        (
            "Loss not worse than the best version's",
            "worse by at most 0.05",
            "champion",
            pytest.approx(1.15),
            "at most 1.150, not to fall behind the best so far",
        ),
        ("Exact match not below production's", "not shown to be worse", "champion", None, ""),
        ("Answers depend on their prompts", "at least 0.1", None, 0.1, "limit: at least 0.100"),
        ("Exact match low enough", "at most 90 %", None, 0.9, "limit: at most 90.0 %"),
    ]
