"""What a number of records lets the gate tell: judged by Tango's bound as solved here from its definition, by plain
simulation of nights under the gate's own rules, and by the normal distribution of scipy."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from components.shared.metrics import METRICS
from components.shared.paired import score_bounds
from components.shared.power import Assumed, power_of

Z = stats.norm.ppf(0.95)


def assumed(metric="exact_match", margin=0.02, rare=0.02, spread=0.1, **more) -> Assumed:
    return Assumed(METRICS[metric], margin, 0.95, rare, spread, **more)


def tango(gain: float, changed: float, records: int, margin: float) -> float:
    """By how many standard errors the gain lies above minus the margin (Statistics in Medicine 17, 1998)."""
    won, lost = records * (changed + gain) / 2, records * (changed - gain) / 2
    quadratic = np.polynomial.Polynomial(
        [lost * margin * (1 + margin), (2 * records - won + lost) * -margin - won - lost, 2 * records]
    )
    share = max(root.real for root in quadratic.roots())
    return (gain + margin) / math.sqrt((2 * share - margin * (1 + margin)) / records)


@pytest.mark.parametrize("records", [160, 190, 500, 1000])
@pytest.mark.parametrize("changed", [0.05, 0.1, 0.2, 0.3])
def test_right_and_wrong_answers_need_what_tangos_bound_leaves(records, changed):
    needed = optimize.brentq(lambda gain: tango(gain, changed, records, 0.02) - Z, -changed, changed)
    assert assumed(spread=changed).better_by(records) == pytest.approx(needed, abs=1e-4)


def test_a_normal_difference_of_losses_needs_what_the_normal_distribution_leaves():
    compared = assumed("loss", 0.02, 0.01, 0.2)
    assert compared.better_by(400) == pytest.approx(Z * 0.2 / 20 - 0.02, abs=0.001)
    assert compared.fewest == math.ceil(math.log(0.05) / math.log(0.99)) == 299
    power = stats.norm.ppf(0.8)
    assert compared.equal_with() == pytest.approx(((Z + power) * 0.2 / 0.02) ** 2, rel=0.05)


@pytest.mark.parametrize(("records", "margin", "changed"), [(150, 0.05, 0.06), (400, 0.02, 0.06), (1000, 0.02, 0.1)])
def test_equal_candidates_pass_as_often_as_is_said(records, margin, changed):
    rng = np.random.default_rng(records)
    won, lost, _ = rng.multinomial(records, [changed / 2, changed / 2, 1 - changed], size=4000).T
    passed = [score_bounds(ours, theirs, records, 0.95)[0] >= -margin for ours, theirs in zip(won, lost, strict=True)]
    assert assumed(margin=margin, spread=changed).equal_passes(records) == pytest.approx(np.mean(passed), abs=0.05)


def test_with_the_records_that_are_named_an_equal_candidate_passes_four_times_in_five():
    for compared in (assumed(), assumed("loss", 0.05, 0.025, 0.11, equal_weight=0.6), assumed("token_f1", 0.05, 0.05)):
        named = compared.equal_with()
        assert compared.equal_passes(named) >= 0.8 > compared.equal_passes(named - 1)


def test_marks_and_groups_need_enough_records_to_show_rare_losses_and_single_right_answers_do_not():
    assert (assumed().fewest, assumed(in_groups=True).fewest, assumed("token_f1").fewest) == (1, 149, 149)
    assert assumed("loss", rare=1.0).fewest == 1


def sentence(compared: Assumed, records: int) -> str:
    return power_of(compared, records, amounts=compared.metric)["sentence"]


def test_the_sentence_says_what_a_candidate_has_to_be():
    first = "160 records judge by exact match: a first version can be promoted; "
    better = sentence(assumed(), 160)
    assert better.startswith(f"{first}to replace it, a candidate has to come out 2.2 points better, or be equal with ")
    assert "equal candidate replaces it in some 77 nights of 100" in sentence(assumed(margin=0.05, spread=0.05), 145)
    assert "nothing can replace it, as only 299 would show" in sentence(assumed("loss", rare=0.01), 160)
    assert "no number" in sentence(assumed(margin=0.0), 160)
    assert "come out 0.005 nats per answer token better" in sentence(assumed("loss", 0.02, 0.01, 0.3), 400)
