"""What a number of records lets the gate tell: judged by Tango's bound as solved here from its definition, by plain
simulation of nights under the gate's own rules, and by the normal distribution of scipy."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from components.config.gate import GateConfig
from components.prepare.power import power_of
from components.shared.paired import score_bounds

Z = stats.norm.ppf(0.95)


def told(metric="exact_match", margin=0.02, records=160, spread=0.1, rare=None, **of_records):
    gate = GateConfig(metric=metric, worse_than_champion_by=margin, much_worse_share=rare)
    return power_of(gate, records, spread, **of_records)


def tango(gain: float, changed: float, records: int, margin: float) -> float:
    """By how many standard errors the gain lies above minus the margin (Statistics in Medicine 17, 1998)."""
    won, lost = records * (changed + gain) / 2, records * (changed - gain) / 2
    linear = (2 * records - won + lost) * -margin - won - lost
    quadratic = np.polynomial.Polynomial([lost * margin * (1 + margin), linear, 2 * records])
    share = max(root.real for root in quadratic.roots())
    return (gain + margin) / math.sqrt((2 * share - margin * (1 + margin)) / records)


@pytest.mark.parametrize(("records", "changed"), [(160, 0.3), (190, 0.05), (500, 0.1), (1000, 0.2)])
def test_right_and_wrong_answers_need_what_tangos_bound_leaves(records, changed):
    needed = optimize.brentq(lambda gain: tango(gain, changed, records, 0.02) - Z, -changed, changed)
    assert told(records=records, spread=changed)["better_by"] == pytest.approx(needed, abs=1e-4)


def test_a_normal_difference_of_losses_needs_what_the_normal_distribution_leaves():
    tells = told("loss", records=400, spread=0.2)
    assert tells["better_by"] == pytest.approx(Z * 0.2 / 20 - 0.02, abs=0.001)
    assert tells["fewest"] == math.ceil(math.log(0.05) / math.log(0.99)) == 299
    power = stats.norm.ppf(0.8)
    assert tells["equal_with"] == pytest.approx(((Z + power) * 0.2 / 0.02) ** 2, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("records", "margin", "changed"), [(150, 0.05, 0.06), (400, 0.02, 0.06)])
def test_equal_candidates_pass_as_often_as_is_said(records, margin, changed):
    rng = np.random.default_rng(records)
    won, lost, _ = rng.multinomial(records, [changed / 2, changed / 2, 1 - changed], size=4000).T
    passed = [score_bounds(ours, theirs, records, 0.95)[0] >= -margin for ours, theirs in zip(won, lost, strict=True)]
    equal_passes = told(records=records, margin=margin, spread=changed)["equal_passes"]
    assert equal_passes == pytest.approx(np.mean(passed), abs=0.05)


@pytest.mark.parametrize("compared", [{}, {"metric": "loss", "margin": 0.05, "spread": 0.11, "equal_weight": 0.6}])
def test_with_the_records_that_are_named_an_equal_candidate_passes_four_times_in_five(compared):
    named = told(**compared)["equal_with"]
    enough, fewer = (told(**compared, records=records)["equal_passes"] for records in (named, named - 1))
    assert enough >= 0.8 > fewer


def test_marks_and_groups_need_enough_records_to_show_rare_losses_and_single_right_answers_do_not():
    fewest = [told(**compared)["fewest"] for compared in ({}, {"in_groups": True}, {"metric": "token_f1"})]
    assert fewest == [1, 149, 149]
    assert told("loss", rare=1.0)["fewest"] == 1


def test_the_sentence_says_what_a_candidate_has_to_be():
    assert "to replace it, a candidate has to come out 2.2 points better, or be equal with" in told()["sentence"]
    assert "replaces it in some 77 nights of 100" in told(margin=0.05, records=145, spread=0.05)["sentence"]
    assert "nothing can replace it, as only 299 would show" in told("loss")["sentence"]
    assert "no number" in told(margin=0.0)["sentence"]
    assert "come out 0.005 nats per answer token better" in told("loss", records=400, spread=0.3)["sentence"]
