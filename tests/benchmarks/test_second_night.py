"""That the nights of the benchmark hold what it says: which rows they have, and by how much candidates are worse."""

import numpy as np
import pytest

from benchmarks.second_night import SETS, _drawn, kept
from components.config.gate import GateConfig
from components.shared.paired import Pairs

ROWS = {
    "words": [{"text": f"word{place}", "label": str(place)} for place in range(80)],
    "talk": [
        {"conversations": [{"from": "human", "value": f"{place}?"}, {"from": "gpt", "value": str(place)}]}
        for place in range(80)
    ],
}


@pytest.mark.parametrize("name", ["words", "talk"])
def test_the_first_night_has_part_of_the_rows_and_the_third_all_of_them_with_other_answers(name: str) -> None:
    data, rows = SETS[name], ROWS[name]
    first, second, third, fourth = (data.of_night(rows, night) for night in (1, 2, 3, 4))
    assert (first, second, fourth) == (rows[:60], rows, rows)
    texts = data.written(third)
    assert sum(one == other for one, other in zip(rows, third, strict=True)) < 8
    for place in range(80):
        assert f'"{place}"' in texts or f",{place}\r\n" in texts


@pytest.mark.parametrize(("metric", "margin"), [("exact_match", 0.05), ("loss", 0.1)])
def test_drawn_candidates_are_worse_by_as_much_as_is_asked(metric: str, margin: float) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(2, 20, 500).astype(float)
    theirs, weights = 2.0 * tokens, tokens
    ours = theirs + tokens * (0.3 + 0.1 * random.standard_normal(500))
    if metric == "exact_match":
        theirs, weights = (random.random(500) < 0.8).astype(float), np.ones(500)
        ours = np.where(random.random(500) < 0.04, 1 - theirs, theirs)
    measured = [Pairs(ours, theirs, weights, lower_is_better=metric == "loss")]
    policy, gains = GateConfig(metric=metric), []
    for _ in range(200):
        drawn, values = _drawn(measured, policy, 400, 2.0, margin, random)
        gains.append((values["candidate"] - values["champion"]).sum() / drawn.sum())
    assert np.mean(gains) == pytest.approx(margin if metric == "loss" else -margin, abs=0.005)


def test_claims_are_made_of_nights_that_were_run() -> None:
    nights = [{"promoted": each} for each in (True, True, False, True, False, True, False, False)]
    assert list(kept(nights[:2]).values()) == [True]
    assert list(kept(nights).values()) == [True, True, True]
    assert list(kept([*nights[:2], {"promoted": True}]).values()) == [True, False]
