"""A candidate that has unlearned what its base can do is held for that, where so few items can show it."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from components.config.gate import GateConfig
from components.gate.policy import significant
from components.records.steps import Decision, Evaluation, Suite
from components.shared.paired import least_loss, mcnemar, shown_worse
from tests.components.gate.evidenced import decide, evaluation, model, rule

ITEMS = 24


def suite(name: str, *, base: int, won: int = 0, lost: int = 0, items: int = ITEMS, **more: object) -> Suite:
    """The base passes the first `base` items, of which the candidate loses some, and wins others."""
    before = [place < base for place in range(items)]
    after = [lost <= place < base + won for place in range(items)]
    passes = {"base": before, "candidate": after}
    return Suite(name=name, title=name, meaning="", sha256="0", items=items, **{"passes": passes, **more})


def decided(*suites: Suite, by: float | None = 0.0, confidence: float = 0.95) -> Decision:
    measured = evaluation(model("v2"), model(loss=9.0), model("v1")).model_copy(update={"suites": suites})
    return decide(measured, GateConfig(suite_worse_by=by, confidence=confidence))


@pytest.mark.parametrize(("won", "lost"), [(0, 1), (0, 5), (3, 9), (9, 3), (7, 7), (0, 0)])
def test_the_chance_is_scipys_of_a_fair_coin(won: int, lost: int) -> None:
    expected = binomtest(lost, won + lost, 0.5, alternative="greater").pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99, 0.999])
def test_the_noise_floor_is_the_first_loss_in_the_tail_of_a_fair_coin(confidence: float) -> None:
    """P(all k of k differing items are lost) = binom.sf(k - 1, k, 1/2) <= 1 - confidence."""
    expected = next(k for k in range(1, 100) if binom.sf(k - 1, k, 0.5) <= 1 - confidence)
    assert least_loss(ITEMS, 0.0, confidence) == expected
    assert least_loss(expected - 1, 0.0, confidence) is None


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


def test_what_is_shown_to_be_unlearned_holds_the_candidate() -> None:
    decision = decided(suite("json", base=20, lost=10), suite("refusal", base=20))
    assert decision.verdict == "hold"
    (reason,) = decision.reasons
    assert reason == (
        "The candidate passes fewer items than the base model in 1 of 2 suites: json (10 of 24 items against 20; 10 "
        "lost and 0 won, which by chance happens with probability 0.00098 if they are equally good, by McNemar's exact "
        "test). The fewest lost items that show, with 97.5 % confidence in each: json 6, refusal 6."
    )
    assert rule(decision, "suites").field == "gate.suite_worse_by"


def test_chance_and_gain_hold_nothing() -> None:
    decision = decided(
        suite("json", base=20, lost=5), suite("refusal", base=4, won=12), suite("over", base=12, won=4, lost=8)
    )
    assert decision.promoted
    assert rule(decision, "suites").text.startswith(
        "In none of 2 suites is the candidate shown to pass fewer items than the base model; lowest is json (15 of"
    )
    assert rule(decision, "suites").text.endswith(
        "refusal is not judged: the base passes 4 of 24 items, and the loss of all of them would not show."
    )


def test_the_more_suites_the_surer_each_must_be() -> None:
    lost = suite("json", base=20, lost=5)  # a chance of 1/32
    assert not decided(lost).promoted
    assert decided(lost, *(suite(f"s{number}", base=20) for number in range(2))).promoted
    # Once the clear one is found, the other is held to what is left.
    both = decided(suite("clear", base=20, lost=15), lost)
    assert "in 2 of 2 suites" in both.reasons[0]


def test_a_margin_allows_what_is_not_shown_to_be_beyond_it() -> None:
    assert decided(suite("json", base=20, lost=6), by=0.2).promoted
    decision = decided(suite("json", base=20, lost=16), by=0.2)
    assert decision.verdict == "hold"
    assert "fewer items than the base model by more than 20 points in 1 of 1 suites" in decision.reasons[0]


def test_where_no_suite_can_tell_the_gate_cannot() -> None:
    few = suite("json", base=3, lost=3)
    left = suite("tool_calls", base=0, items=0, left_out="the base's chat template takes no tools", passes={})
    decision = decided(few, left)
    assert decision.verdict == "cannot tell"
    assert decision.reasons == (
        "No suite can tell whether the candidate unlearned anything. json is not judged: the base passes 3 of 24 "
        "items, and the loss of all of them would not show. tool_calls is not judged: the base's chat template takes "
        "no tools.",
    )
    assert decided(left, suite("json", base=20)).promoted


def test_what_was_not_asked_is_not_taken_for_granted() -> None:
    assert decided().verdict == "hold"
    half = suite("json", base=20).model_copy(update={"passes": {"base": [True] * ITEMS}})
    decision = decided(half, suite("refusal", base=20))
    assert decision.verdict == "hold"
    assert decision.reasons[0].startswith("Of json it is not known what base and candidate pass")


def test_nothing_is_asked_by_default_and_what_was_found_is_part_of_what_the_verdict_follows_from() -> None:
    lost = decided(suite("json", base=20, lost=20), by=None)
    assert lost.promoted
    assert "suites" not in {each.name for each in lost.rules}
    assert lost.basis_sha256 != decided(suite("json", base=20), by=None).basis_sha256


def test_an_evaluation_from_before_there_were_suites_is_read_and_decided_as_it_was() -> None:
    measured = evaluation(model("v2"), model(loss=9.0), model("v1"))
    body = measured.model_dump(mode="json", exclude={"suites"})
    old = Evaluation.model_validate(body, strict=False)
    assert old.suites == ()
    assert decide(old, GateConfig()).basis_sha256 == decide(measured, GateConfig()).basis_sha256


def test_suites_are_read_as_they_were_written() -> None:
    measured = evaluation(model("v2"), model(loss=9.0)).model_copy(update={"suites": (suite("json", base=9, lost=2),)})
    again = Evaluation.from_json(measured.as_json(), "s3://b/evaluation.json")
    assert again.suites == measured.suites
    assert decide(again, GateConfig()).basis_sha256 == decide(measured, GateConfig()).basis_sha256
