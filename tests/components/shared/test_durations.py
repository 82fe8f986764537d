import pytest

from components.shared.protocol import duration, estimated_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.25, "0.25 s"), (4, "4 s"), (59.9, "59.9 s"), (59.97, "1 min 00 s"), (214, "3 min 34 s"),
        (3599.6, "1 h 00 min"), (7260, "2 h 01 min"),
    ],
)  # fmt: skip
def test_a_measured_duration_is_told_to_what_matters_at_its_length(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (89, "89 s"), (600, "10 min"), (7200, "2 h 0 min")])
def test_an_estimated_duration_is_told_no_finer_than_it_is_known(seconds: float, text: str) -> None:
    assert estimated_duration(seconds) == text
