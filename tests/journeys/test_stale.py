"""The world has changed since production was trained: `fineloop adapters check` says so, and production goes back.

The model, the store and the Ray workers are real. The judges: the truth that the test itself gave to each file of rows,
and boto3, which reads the alias.
"""

import json
from typing import Any

import pytest

from tests.journeys.conftest import Person
from tests.models.tiny import COLOURS, colour_rows

pytestmark = [pytest.mark.e2e]
THINGS = sorted(COLOURS)
TURNED = {thing: COLOURS[THINGS[place - 1]] for place, thing in enumerate(THINGS)}
"""Another truth: each thing has the colour of the one before it."""


def rows_of(truth: dict[str, str], *, first: int, count: int) -> str:
    rows = colour_rows(first + count)[first:]
    return "".join(json.dumps(row | {"completion": truth[row["prompt"].split()[1]]}) + "\n" for row in rows)


def checks(person: Person, data: str) -> dict[str, Any]:
    return person.does(f"fineloop adapters check colours --data {data} --json --set check.roll_back=true").answer


def test_what_got_worse_on_later_records_goes_back_and_what_did_not_is_left_alone(person: Person) -> None:
    config = person.has_colours(rows=400)
    person.does("fineloop ray up")  # each command would start a head of its own
    old = person.does(f"fineloop run -c {config} --json").answer["version"]
    turned = person.has("turned.jsonl", rows_of(TURNED, first=400, count=400))
    trained = person.does(f"fineloop train -c {config} --set data.source={turned} --json").answer
    new = trained["version"]
    person.does(f"fineloop adapters promote colours@{new} --by ada --reason 'colours have turned'")

    person.has("fresh.jsonl", rows_of(TURNED, first=800, count=40))
    fresh = checks(person, "fresh.jsonl")
    assert (fresh["version"], fresh["against"], fresh["new_records"]) == (new, old, 40)
    assert (fresh["verdict"], fresh["moved"]) == ("still better", None)
    assert fresh["lower"] > 0

    # The colours are what they were before, and the looks add up: these and the forty.
    person.has("back.jsonl", rows_of(COLOURS, first=1000, count=400))
    back = checks(person, "back.jsonl")
    assert (back["verdict"], back["records"], back["moved"]["to"]) == ("worse", 440, old)
    assert back["fresh"] > back["held_out"]

    shown = person.does("fineloop adapters show colours --json").answer
    assert shown["version"] == old
    history = person.does("fineloop adapters history colours --json").answer["events"]
    assert [event["kind"] for event in history][-3:] == ["checked", "checked", "rolled_back"]
    assert new in history[-1]["body"]["reason"]
    audit = person.does("fineloop adapters audit --json").answer
    assert audit["findings"] == []
