import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest

from components.config import config_file
from components.config.gate import ApprovalConfig, GateConfig, Guard, Limit
from components.gate.gate import replay, run_gate
from components.gate.policy import significant
from components.records import runs
from components.records.steps import Decision, Evaluation, HarnessScores, TaskScore, TextLosses
from components.shared.errors import ConfigError, DataError
from components.shared.metrics import METRICS
from components.shared.paired import shown_worse
from components.store.store import Store
from tests.components.config.loading import GOOD
from tests.components.gate.evidenced import as_parquet, decide, evaluation, evidence, model, rule


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
    limits = [Limit(metric="answer_prompt_gain", min=0.1), Limit(metric="exact_match", min=0.5, max=0.9)]
    decision = decide(evaluation(model("v2", exact_match=0.4), model(loss=2.0)), GateConfig(limits=limits))
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


# What every rule lets pass may still be a person's to decide.


def with_approval(changed: float | None = 0.1, *, loss: float = 0.9, **approval: Any) -> Decision:
    champion = None if changed is None else model("v1")
    measured = evaluation(model("v2", loss=loss), model(loss=9.0), champion)
    policy = GateConfig(approval=ApprovalConfig(**approval))
    return decide(measured.model_copy(update={"changed_answers": changed}), policy)


def test_an_adapter_may_ask_for_every_version() -> None:
    assert with_approval().verdict == "promote"
    decision = with_approval(always=True)
    assert (decision.verdict, decision.decision, decision.waits) == ("needs approval", "hold", True)
    assert decision.reasons == ("A person has to approve every version of this adapter.",)
    assert rule(decision, "approval").field == "gate.approval.always"


@pytest.mark.parametrize(
    ("changed", "verdict"), [(0.3, "promote"), (0.301, "needs approval"), (None, "needs approval")]
)
def test_the_size_of_the_change_may_ask(changed: float | None, verdict: str) -> None:
    decision = with_approval(changed, changed_answers_above=0.3)
    assert decision.verdict == verdict
    found = rule(decision, "approval")
    reason = "points to no version yet" if changed is None else f"{changed * 100:.1f} % of the answers are other ones"
    assert reason in found.text
    assert found.bound_text == "at most 30 % changed"


def test_what_a_rule_holds_no_person_is_asked_about() -> None:
    decision = with_approval(loss=1.5, always=True)
    assert (decision.verdict, decision.waits) == ("hold", False)
    assert len(decision.reasons) == 1


def test_how_much_changed_is_part_of_what_the_verdict_follows_from() -> None:
    assert with_approval(0.1).basis_sha256 != with_approval(0.2).basis_sha256


# A candidate that has unlearned what its base can do is held for that, where the documents of a task can show it.


ITEMS = 24


def task(name: str, *, base: int, won: int = 0, lost: int = 0) -> list[TaskScore]:
    """The base passes the first `base` documents, of which the candidate loses some, and wins others."""
    both = [place < base for place in range(ITEMS)], [lost <= place < base + won for place in range(ITEMS)]
    return [TaskScore(task=name, metric="passes", value=sum(p) / ITEMS, passes=tuple(p)) for p in both]


def scored(name: str, base: float | None, ours: float | None, stderr: float, *, lower: bool = False) -> list[TaskScore]:
    about = {"task": name, "metric": "acc", "stderr": stderr, "lower_is_better": lower}
    return [TaskScore(value=value, **about) for value in (base, ours)]


def on_tasks(*tasks: list[TaskScore], by: float = 0.0, left_out: str = "") -> Decision:
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
    decision = on_tasks(*tasks, by=by)
    assert decision.verdict == verdict
    assert text in rule(decision, "lm_eval").text


def test_scores_that_were_left_out_hold_the_candidate_with_the_reason() -> None:
    assert "score, as its workers do." in on_tasks(left_out="as its workers do").reasons[0]


def test_nothing_is_asked_by_default_and_scores_are_part_of_what_the_rule_follows_from() -> None:
    measured = evaluation(model("v2"), model(loss=9.0), model("v1"))
    assert "lm_eval" not in {each.name for each in decide(measured, GateConfig()).rules}
    harness = HarnessScores(lm_eval="0", tasks=(), scores={"base": tuple(task("json", base=9))})
    with_scores = measured.model_copy(update={"harness": harness})
    assert decide(with_scores, GateConfig()).basis_sha256 == decide(measured, GateConfig()).basis_sha256
    one = on_tasks(task("json", base=20, lost=1))
    assert one.basis_sha256 != on_tasks(task("json", base=20)).basis_sha256
    again = Evaluation.from_json(with_scores.as_json(), "s3://b/evaluation.json")
    assert again.harness == harness


# A candidate that forgets what its base knows, or moves too far from what it answers, is held for that.


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


def test_where_no_limit_is_set_half_a_nat_is_one_and_decisions_from_before_it_stay_what_they_are(store: Store) -> None:
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
    records, earlier = (runs.run_key(run_id, runs.EVALUATION_RECORDS) for run_id in ("forgot", "before"))
    store.put(earlier, store.get(records))
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
    evaluations = (of(), of(texts([0.0])), of(texts([0.01])), of(own=texts([0.0])))
    bases = {decide(measured, GateConfig()).basis_sha256 for measured in evaluations}
    assert len(bases) == 4
    older = Evaluation.from_json(of().as_json().replace(b'"own_answers"', b'"what_nobody_knows"'), "here")
    assert decide(older, GateConfig()).basis_sha256 in bases


def test_answers_that_decide_have_to_be_asked_for() -> None:
    policy = ["gate.kl_from_base_at_most=0.5"]
    assert config_file.loads(GOOD, [*policy, "evaluate.own_answers=24"]).gate.kl_from_base_at_most == 0.5
    with pytest.raises(ConfigError, match=r"gate\.kl_from_base_at_most asks for what evaluate\.own_answers 0 does not"):
        config_file.loads(GOOD, policy)
