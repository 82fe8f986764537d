"""The table of what was asked outside the domain."""

import re
from dataclasses import replace

from components.report.comparison import suites
from components.report.page import build_report
from tests.components.report.example_runs import promoted_run, unlearned_run


def test_a_suite_is_told_with_its_differences_and_what_it_can_show() -> None:
    table = suites(unlearned_run())
    assert table is not None
    assert (table.margin, table.sure) == ("10 points", "95 %")
    json, tools = table.rows
    assert json.passed == {"base": "18", "champion": "17", "candidate": "4"}
    # 15 and 14 lost and 1 won: 17 of 65536 and 16 of 32768 ways in which a fair coin falls.
    assert json.against == {
        "base": ("14 worse (1 won, 15 lost; 0.00026)", "worse"),
        "champion": ("13 worse (1 won, 14 lost; 0.00049)", "worse"),
    }
    assert json.least_loss == "6"
    assert (tools.left_out, tools.passed["base"], tools.least_loss) == ("no tools", "\N{EN DASH}", "none")


def test_without_a_decision_a_loss_is_held_to_nothing() -> None:
    table = suites(replace(unlearned_run(), decision=None))
    assert table is not None
    assert (table.margin, table.rows[0].least_loss) == ("", "5")


def test_the_page_draws_the_table_and_escapes_what_models_and_prompts_say() -> None:
    page = build_report(unlearned_run())
    assert "Outside the domain" in page
    assert "Give &lt;JSON&gt;" in page
    assert "<b>No</b>" not in page
    assert "Left out: no tools." in page
    assert re.search(r"json|JSON \(4 of 24 items against 18", page)


def test_without_suites_there_is_no_table() -> None:
    assert suites(promoted_run()) is None
    assert "Outside the domain" not in build_report(promoted_run())
