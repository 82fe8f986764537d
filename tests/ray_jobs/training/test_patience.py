import pytest

from components.shared.errors import IntegrityError, StoreError
from ray_jobs.training import checkpoint
from ray_jobs.training.checkpoint import patiently


def refusing(errors: list[StoreError]):
    def act() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    return act


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Time that only sleeping passes."""
    passed = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: passed[0])
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: passed.__setitem__(0, passed[0] + seconds))
    return passed


def test_what_a_store_refuses_is_tried_again_until_it_is_there(clock, caplog):
    assert patiently(60, refusing([StoreError("503"), StoreError("503")]), "waiting to publish") == "done"
    assert clock == [20.0]
    assert "waiting to publish, for another 50 s at most" in caplog.text


def test_after_its_time_the_store_s_own_words_end_it(clock):
    with pytest.raises(StoreError, match="503"):
        patiently(60, refusing([StoreError("503")] * 9), "waiting")
    assert clock == [60.0]


def test_what_is_wrong_in_the_store_is_not_tried_again(clock):
    with pytest.raises(IntegrityError):
        patiently(60, refusing([IntegrityError("damaged")]), "waiting")
    assert clock == [0.0]
