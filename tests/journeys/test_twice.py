"""The same run once more, as README.md has it, and then another: what the log, the gate and the page make of it.

Of the log the judge is each object as it lies in the store, read with plain boto3; of the page its text.
"""

import re
from typing import Any

import pytest

from tests.journeys.bucket import Bucket
from tests.journeys.conftest import Done, Person

pytestmark = [pytest.mark.e2e, pytest.mark.full]
RUN = "fineloop run -c colours.toml --json"
UNLEARNED = "--set train.learning_rate=1e-6"
"""A training that makes another version, and a worse one."""


@pytest.fixture(scope="module")
def runs(person: Person) -> list[Done]:
    person.has_colours(rows=600)
    return [person.does("fineloop ray up && " + RUN), person.does(RUN), person.does(f"{RUN} {UNLEARNED}")]


@pytest.fixture(scope="module")
def bucket(person: Person, runs: list[Done]) -> Bucket:
    return Bucket.of(person)


@pytest.fixture(scope="module")
def log(bucket: Bucket) -> list[dict[str, Any]]:
    """The events of the three runs, oldest first."""
    return bucket.log("colours")


def test_the_same_run_again_makes_the_same_version_and_says_that_nothing_changed(runs: list[Done]) -> None:
    first, again, _ = (each.answer for each in runs)
    assert (first["decision"], first["promoted"]) == ("promote", True)
    assert (again["version"], again["decision"], again["promoted"]) == (first["version"], "hold", False)
    assert again["reasons"] == [
        f"Nothing changed: the candidate is {first['version']}, the very version that production points to now."
    ]


def test_that_is_no_refusal(runs: list[Done], log: list[dict[str, Any]]) -> None:
    first, _, worse = (each.answer for each in runs)
    assert worse["decision"] == "hold"
    moves_made = [(event["kind"], event["body"].get("version", event["body"].get("to"))) for event in log]
    assert moves_made == [
        ("published", first["version"]),
        ("promoted", first["version"]),
        ("published", worse["version"]),
        ("refused", worse["version"]),
    ]


def test_and_no_decision_on_the_held_out_records(runs: list[Done], bucket: Bucket, log: list[dict[str, Any]]) -> None:
    """The next night's is the second: the log names the test set in the promotion, and in that night's refusal."""
    named = [event["body"].get("test_set") or event["body"].get("evidence", {}).get("test_set") for event in log]
    decided = [sample for sample in named if sample]
    assert len(decided) == 2
    assert decided[0] == decided[1]
    assert bucket.json(f"runs/{runs[2].answer['run_id']}/decision.json")["look"] == len(decided)


def test_the_version_stays_the_gates_choice(person: Person, runs: list[Done]) -> None:
    first, _, worse = (each.answer["version"] for each in runs)
    refused = person.types(f"fineloop adapters promote colours@{worse}")
    assert refused.exit_code == 2
    assert "--by and --reason" in refused.screen
    person.does(f"fineloop adapters promote colours@{worse} --by ann --reason 'to see what users say'")
    person.does(f"fineloop adapters promote colours@{first}")
    history = person.does("fineloop adapters history colours --json").answer["events"]
    assert [event["kind"] for event in history[-2:]] == ["overridden", "promoted"]
    person.does("fineloop adapters page colours --to pages")
    page = re.sub(r"<[^>]*>", " ", (person.folder / "pages" / "colours.html").read_text())
    assert page.count("refused by the gate") == 1
    assert page.count("although the gate refused it") == 1
