"""What a finished run says to a person."""

from components.shared.metrics import METRICS
from pipelines.local.outcome import Outcome, summary


def test_the_numbers_of_all_metrics_stand_in_columns() -> None:
    values: dict[str, float | None] = dict.fromkeys(METRICS, 0.5)
    text = summary(
        Outcome(
            run_id="r",
            adapter="sums",
            alias="production",
            version="v1",
            version_uri="s3://b/v1",
            decision="hold",
            verdict="hold",
            promoted=False,
            reasons=["It is worse."],
            metrics={"base": values, "champion": None, "candidate": values},
            report=None,
            store={"endpoint": "http://127.0.0.1:1", "bucket": "b", "prefix": ""},
            timings_s={"total": 1.0},
        ),
        home_option="",
    )
    table = text.split("\n\n")[1].splitlines()
    assert len(table) == 1 + len(METRICS)
    assert len({len(line) for line in table}) == 1
