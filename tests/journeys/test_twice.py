"""The same run once more, as README.md has it, and then another: what the log, the gate and the page make of it.

Of the log the judge is each object as it lies in the store, read with plain boto3; of the page its text.
"""

import re

import pytest

from tests.journeys.bucket import Bucket
from tests.journeys.conftest import Person

pytestmark = [pytest.mark.e2e, pytest.mark.full]
RUN = "fineloop run -c colours.toml --json"
UNLEARNED = "--set train.learning_rate=1e-6"
"""A training that makes another version, and a worse one."""


def test_the_same_run_again_and_then_a_worse_one(person: Person) -> None:
    person.has_colours(rows=600)
    lines = ("fineloop ray up && " + RUN, RUN, f"{RUN} {UNLEARNED}")
    first, again, worse = (person.does(line).answer for line in lines)
    assert (first["decision"], first["promoted"]) == ("promote", True)
    assert (again["version"], again["decision"], again["promoted"]) == (first["version"], "hold", False)
    assert again["reasons"] == [
        f"Nothing changed: the candidate is {first['version']}, the very version that production points to now."
    ]
    assert worse["decision"] == "hold"

    bucket = Bucket.of(person)
    log = bucket.log("colours")
    moves = [(event["kind"], event["body"].get("version", event["body"].get("to"))) for event in log]
    assert moves == [
        ("published", first["version"]),
        ("promoted", first["version"]),
        ("published", worse["version"]),
        ("refused", worse["version"]),
    ]
    # The log names the test set in the promotion and in the refusal: the same run again is no decision on it.
    named = [event["body"].get("test_set") or event["body"].get("evidence", {}).get("test_set") for event in log]
    decided = [sample for sample in named if sample]
    assert (len(decided), len(set(decided))) == (2, 1)
    assert bucket.json(f"runs/{worse['run_id']}/decision.json")["look"] == 2

    refused = person.types(f"fineloop adapters promote colours@{worse['version']}")
    assert refused.exit_code == 2
    assert "--by and --reason" in refused.screen
    person.does(f"fineloop adapters promote colours@{worse['version']} --by ann --reason 'to see what users say'")
    person.does(f"fineloop adapters promote colours@{first['version']}")
    history = person.does("fineloop adapters history colours --json").answer["events"]
    assert [event["kind"] for event in history[-2:]] == ["overridden", "promoted"]
    person.does("fineloop adapters page colours --to pages")
    page = re.sub(r"<[^>]*>", " ", (person.folder / "pages" / "colours.html").read_text())
    assert page.count("refused by the gate") == page.count("although the gate refused it") == 1
