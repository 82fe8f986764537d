"""The sweeps whose records are kept: the document says what they hold."""

import pytest

from benchmarks import sweeps
from ray_jobs.sweeping import verdict

KEPT = sweeps.kept()


def test_the_document_is_what_is_written_from_the_records():
    assert sweeps.DOCUMENT.read_text() == sweeps.document(KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_rates_and_verdict_are_those_of_the_kept_losses(name):
    record = KEPT[name]
    reference = verdict.reference_of([tuned.method for tuned in record.tuned])
    assert verdict.verdict(record.best, record.tuned, record.comparisons, reference) == record.verdict
    for tuned in record.tuned:
        losses = {rate.learning_rate: rate.loss for rate in tuned.rates if rate.loss is not None}
        assert min(losses, key=losses.__getitem__) == tuned.learning_rate


def test_the_example_s_best_rate_has_worse_ones_on_either_side_and_divergence_above():
    best = KEPT["rates"].best
    assert len(best.rates) >= 5
    assert best.is_inside
    assert best.rates[-1].statuses == ["diverged"]
    assert best.gain_over_prior >= 0
