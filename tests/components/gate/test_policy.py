import json
import math
from typing import Any

import pytest

from components.config.gate import GateConfig, Guard, Limit
from components.records.steps import Decision
from components.shared.errors import DataError
from tests.components.gate.evidenced import decide, evaluation, model, rule


def without_limits(**settings: Any) -> GateConfig:
    return GateConfig(limits=[], **settings)


@pytest.mark.parametrize(
    ("against", "metric", "other", "margin", "candidate", "passed"),
    [
        ("base", "loss", 0.30, 0.05, 0.25, True),  # 0.30 - 0.25 is less than 0.05 in binary
        ("base", "loss", 0.30, 0.05, 0.2501, False),
        ("base", "exact_match", 0.10, 0.2, 0.30, True),
        ("base", "exact_match", 0.10, 0.2, 0.2999, False),
        ("champion", "loss", 0.50, 0.02, 0.52, True),
        ("champion", "loss", 0.50, 0.0, 0.5001, False),
        ("champion", "token_f1", 0.70, 0.1, 0.60, True),
        ("champion", "token_f1", 0.70, 0.1, 0.5999, False),
    ],
)
def test_a_margin_over_the_base_and_a_tolerance_beside_the_champion_include_their_bound(
    against: str, metric: Any, other: float, margin: float, candidate: float, passed: bool
) -> None:
    of_rule = {"better_than_base_by": margin}
    models = {"base": model(**{metric: other})}
    if against == "champion":
        of_rule = {"better_than_base_by": -100.0, "worse_than_champion_by": margin}
        models = {"base": model(), "champion": model("v1", **{metric: other})}
    measured = evaluation(model("v2", **{metric: candidate}), **models)
    decision = decide(measured, without_limits(metric=metric, **of_rule))
    name = {"base": "better_than_base", "champion": "not_worse_than_champion"}[against]
    assert rule(decision, name).passed is passed
    assert decision.promoted is passed


@pytest.mark.parametrize(
    ("metric", "bounds", "candidate", "passed"),
    [
        ("loss", {"max": 1.5}, 1.5, True),
        ("loss", {"max": 1.5}, 1.5001, False),
        ("exact_match", {"min": 0.6}, 0.6, True),
        ("exact_match", {"min": 0.6}, 0.5999, False),
        ("exact_match", {"min": 0.6, "max": 0.9}, 0.95, False),
    ],
)
def test_limits_include_their_bound(metric: Any, bounds: dict[str, float], candidate: float, passed: bool) -> None:
    policy = GateConfig(better_than_base_by=-100.0, limits=[Limit(metric=metric, **bounds)])
    assert decide(evaluation(model("v2", **{metric: candidate}), model()), policy).promoted is passed


def test_each_bound_of_each_limit_is_a_rule_that_names_its_field() -> None:
    policy = GateConfig(
        limits=[Limit(metric="answer_prompt_gain", min=0.1), Limit(metric="exact_match", min=0.5, max=0.9)],
    )
    decision = decide(evaluation(model("v2", exact_match=0.4), model(loss=2.0)), policy)
    assert [(each.field, each.bound, each.passed) for each in decision.rules[2:]] == [
        ("gate.limits[0].min", 0.1, True),
        ("gate.limits[1].min", 0.5, False),
        ("gate.limits[1].max", 0.9, True),
    ]
    assert decision.reasons == ("The candidate's exact match of 40.0 % is below the limit: at least 50 % is required.",)


@pytest.mark.parametrize(("name", "value"), [("candidate", None), ("base", math.nan), ("champion", math.inf)])
def test_a_number_that_is_missing_or_not_finite_holds(name: str, value: Any) -> None:
    models = {"candidate": model("v2"), "base": model(loss=2.0), "champion": model("v1")}
    assert decide(evaluation(**models), GateConfig()).promoted
    models[name] = model(models[name].version, loss=value)
    decision = decide(evaluation(**models), GateConfig())
    assert decision.decision == "hold"
    who = {"champion": "production version", "base": "base model"}.get(name, name)
    assert any(who in reason and "cannot be checked" in reason for reason in decision.reasons)
    json.loads(decision.as_json(), parse_constant=pytest.fail)


def test_an_unmeasured_limit_holds() -> None:
    decision = decide(evaluation(model("v2", answer_prompt_gain=None), model(loss=2.0)), GateConfig())
    assert decision.decision == "hold"
    assert rule(decision, "limit_min").passed is False


def test_a_metric_that_no_rule_compares_may_be_absent_and_must_be_sound() -> None:
    assert decide(evaluation(model("v2", token_f1=None), model(loss=2.0)), GateConfig()).promoted
    decision = decide(evaluation(model("v2", token_f1=math.nan), model(loss=2.0)), GateConfig())
    assert decision.decision == "hold"
    assert "token F1 is nan" in decision.reasons[0]


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
    assert "loss of 1.000 nats per answer token is worse than production's 0.900 by 0.100; it may" in held.reasons[0]


@pytest.mark.parametrize("absent", ["candidate", "base"])
def test_an_evaluation_without_a_model_is_refused(absent: str) -> None:
    models = {"candidate": model("v2"), "base": model(loss=2.0), absent: None}
    with pytest.raises(DataError, match=absent):
        decide(evaluation(**models), GateConfig())


def test_each_rule_draws_its_line_where_it_binds() -> None:
    policy = GateConfig(limits=[Limit(metric="answer_prompt_gain", min=0.1), Limit(metric="exact_match", max=0.9)])
    decision = decide(evaluation(model("v2"), model(loss=2.0), model("v1", loss=1.1)), policy)
    found = [(each.against, each.line) for each in decision.rules if each.line]
    assert [against for against, _ in found] == ["base", "champion", "champion", None, None]
    assert [line for _, line in found] == pytest.approx([1.95, 1.12, 1.15, 0.1, 0.9])
    assert decision.rules[1].line_text == "at most 1.950, to beat the base"


def test_a_function_of_the_configs_own_decides_guards_and_limits_like_any_metric() -> None:
    key = "acme.scores:house_style"
    policy = GateConfig(metric=key, guards=[Guard(metric=key)], limits=[Limit(metric=key, min=0.5)])

    def decided(ours: float, champion: float) -> Decision:
        models = (model("v2", **{key: ours}), model(**{key: 0.2}), model("v1", **{key: champion}))
        return decide(evaluation(*models), policy)

    better = decided(0.8, 0.79)
    assert better.promoted
    assert "house style of 80.0 % is better than the base model's 20.0 % by 60.0 points" in better.reasons[1]
    assert decided(0.7, 0.8).verdict == "hold"
    low = decided(0.4, 0.4)
    assert low.reasons == ("The candidate's house style of 40.0 % is below the limit: at least 50 % is required.",)
