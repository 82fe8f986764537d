import pytest

from components.shared.metrics import METRICS

LOSS, MATCH = METRICS["loss"], METRICS["exact_match"]


@pytest.mark.parametrize(
    ("value", "beside", "text"),
    [
        (0.12345, (), "0.123"),
        (12.345, (), "12.35"),
        (123.45, (), "123.5"),
        (12345.6, (), "12,346"),
        (1.0001, (1.0002,), "1.0001"),
        (1.0, (1.0,), "1.000"),
    ],
)
def test_a_number_has_as_many_digits_as_people_read_and_as_keep_it_apart(
    value: float, beside: tuple[float, ...], text: str
) -> None:
    assert LOSS.text(value, *beside) == text


def test_shares_are_in_per_cent_and_their_differences_in_points() -> None:
    texts = MATCH.text(0.72), MATCH.amount_text(-0.04), MATCH.bound_text(0.3), MATCH.margin_text(0.05)
    assert texts == ("72.0 %", "4.0 points", "30 %", "5 points")
    assert MATCH.signed_text(-0.04) == "−4.0 points"  # noqa: RUF001 - a true minus sign


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_better_is_the_same_way_for_the_gain_and_for_the_line(metric) -> None:  # type: ignore[no-untyped-def]
    better = metric.better_by(0.5, 0.1)
    assert metric.gain(better, 0.5) == pytest.approx(0.1)
    assert (better < 0.5) is metric.lower_is_better
