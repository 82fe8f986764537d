"""What a finished run says to a person."""

import re
from pathlib import Path

from components.records import runs
from components.records.steps import Decision
from components.report.registry_page import write_pages
from components.report.report import PAGES_FROM_RUN, build_report
from components.report.run_files import RunFiles
from components.shared.metrics import METRICS
from components.store.store import Store
from pipelines.local.run import Finished, Outcome, read_outcome, summary


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


def test_a_report_on_this_machine_has_the_pages_that_it_links_to_beside_it(store: Store, tmp_path: Path) -> None:
    about = {"adapter": "sums", "alias": "production", "run_id": "r", "reasons": ()}
    runs.write(store, "r", Decision(decision="skipped", **about))
    report = build_report(RunFiles(run_id="r", adapter="sums"), pages_at=PAGES_FROM_RUN)
    store.put("runs/r/report.html", report.encode())
    write_pages(store, "sums", generated_at="now")
    store.put("pages/sums.html", b"its versions")
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    (tmp_path / "pages").mkdir(mode=0o755)  # as an earlier release left it
    read_outcome(Finished(store, "r", folder, 0, 0))
    links = re.findall(r'href="(\.\./[^"]+)"', (folder / "report.html").read_text())
    assert [(folder / link).resolve().name for link in links] == ["sums.html", "index.html"]
    assert all((folder / link).is_file() for link in links)
    assert (tmp_path / "pages").stat().st_mode & 0o777 == 0o700
