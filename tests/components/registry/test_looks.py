"""What a further decision on the same records asks for."""

from functools import partial

import numpy as np
import pytest
from scipy.stats import norm

from components.registry.event_log import Event, append_event, confidence_at, decided_before, events
from components.store.store import Store

ALPHA = 0.05


def test_a_look_spends_more_for_each_that_passed_before() -> None:
    """LOND (Javanmard and Montanari, arXiv:1502.06197), with 1 / (k (k + 1)) as the parts of the error rate."""
    assert 1 - confidence_at(20, 0.95, 16) == pytest.approx(ALPHA * 16 / 420)
    assert confidence_at(20, 0.95, 1) == confidence_at(20, 0.95, 0) == confidence_at(20, 0.95)
    assert all(0.95 < confidence_at(look, 0.95, look - 1) < 1 for look in range(1, 1000))


def test_at_the_twentieth_look_a_third_fewer_records_tell() -> None:
    """By the usual formula for a mean: records grow with (z + z)^2, for four cases of five."""

    def records(confidence: float) -> float:
        return float((norm.ppf(confidence) + norm.ppf(0.8)) ** 2)

    assert records(confidence_at(20, 0.95, 16)) < 0.7 * records(confidence_at(20, 0.95))


@pytest.mark.parametrize("bad", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_the_share_of_wrong_ones_among_those_that_pass_is_that_of_one_look(bad: float, shared: float) -> None:
    """A hundred looks at the same records, which move all of them together; bad candidates lie on the line itself."""
    random, years, nights = np.random.default_rng(0), 4000, 100
    is_bad = random.random((years, nights)) < bad
    noise = np.sqrt(shared) * random.standard_normal((years, 1))
    seen = noise + np.sqrt(1 - shared) * random.standard_normal((years, nights)) + np.where(is_bad, 0.0, 4.0)
    passed, wrong = np.zeros(years, int), np.zeros(years, int)
    for night in range(nights):
        counts, place = np.unique(passed, return_inverse=True)
        levels = norm.ppf([confidence_at(night + 1, 0.95, int(each)) for each in counts])
        passes_now = seen[:, night] > levels[place]
        passed += passes_now
        wrong += passes_now & is_bad[:, night]
    share = wrong / np.maximum(passed, 1)
    assert share.mean() <= ALPHA + 3 * share.std() / np.sqrt(years)


def test_what_took_the_place_of_another_by_the_gate_on_these_records_is_counted(store: Store) -> None:
    def moved(run_id: str, kind: str = "promoted", before: str | None = "v0", test_set: str = "a") -> Event:
        evidence = {"test_set": [test_set], "sha256": "0"} if run_id else {}
        body = {"alias": "production", "run_id": run_id, "from": before, "to": f"v-{run_id}", "evidence": evidence}
        return append_event(store, "icd", kind, {**body, "manifest_sha256": "0", "reason": ""})

    moved("first", before=None)  # there was none whose place it took
    for run_id in ("second", "third", "now"):
        moved(run_id)
    moved("elsewhere", test_set="b")
    moved("", kind="overridden")  # by a person
    append_event(store, "icd", "refused", {"alias": "production", "run_id": "held", "test_set": ["a"]})
    log = events(store, "icd")
    assert len(decided_before(log, "production", ["a"], run_id="now")) == 4
    replaced = decided_before(log, "production", ["a"], run_id="now", replaced=True)
    assert [event.body["run_id"] for event in replaced] == ["second", "third"]
    not_third = partial(decided_before, counts=lambda event: event.body["run_id"] != "third")
    assert len(not_third(log, "production", ["a"], run_id="now", replaced=True)) == 1
