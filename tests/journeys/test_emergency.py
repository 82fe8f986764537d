"""Production must go back, now, and something else is wrong too: one command does it, by the first digits of a version.

The store is a real S3 server, and the commands are processes; what is wrong is put there with boto3, or is a proxy's.
Whether production went back is read with boto3 from the alias itself.
"""

import gzip
import json
from collections.abc import Callable, Iterator

import pytest

from components.registry.aliases import promote
from components.registry.event_log import append_event
from pipelines.local.seaweedfs import Endpoint
from tests.journeys.keeper import Keeper, keeper_at

pytestmark = [pytest.mark.e2e]
EVENTS, INDEX = "adapters/sums/events/", "adapters/sums/index/"
NUMBER_OF_AN_INDEX = 101


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory, s3_server: Endpoint) -> Keeper:
    """Two versions held production one after the other, and one never did."""
    keeper = keeper_at(tmp_path_factory.mktemp("emergency") / "keeper", s3_server)
    for weights in ("good", "bad"):
        keeper.does(f"fineloop adapters promote sums@{keeper.publishes(weights)} -c sums.toml")
    keeper.publishes("new")
    return keeper


@pytest.fixture
def good(keeper: Keeper) -> Iterator[str]:
    """The version to go back to; the bad one is in production."""
    good, bad = keeper.publishes("good"), keeper.publishes("bad")
    promote(keeper.store, "sums", bad)
    before = keeper.keys()
    yield good
    assert before <= keeper.keys()  # nobody mends by removing


def goes_back(keeper: Keeper, good: str, *words: str) -> None:
    assert keeper.holder() != good
    done = keeper.types(f"fineloop adapters rollback sums {' '.join(words)} -c sums.toml --json")
    assert done.exit_code == 0, done.screen
    assert "Traceback" not in done.screen
    assert done.answer["to"] == good
    assert keeper.holder() == good


def junk(keeper: Keeper, good: str) -> None:
    for folder in ("events", "aliases", "versions", f"versions/{good[:6]}0", "index", "signatures/x"):
        for name in ("2026-x.json", "staging.json", "NOT A NAME.json", "notes.txt", "manifest.json"):
            keeper.registry.write(f"adapters/sums/{folder}/{name}", b"\xffjunk")
    for key in ("adapters/sums/watermark.json", "runs/x/decision.json", "runs/x/config.toml", "junk"):
        keeper.registry.write(key, b"[]")
    keeper.registry.write(
        f"{EVENTS}2026-y.json", json.dumps({"id": 1, "kind": "promoted", "body": {"to": []}}).encode()
    )


def an_event_gone(keeper: Keeper, good: str) -> None:
    """The log lacks what the alias says, as when a promoter dies at once after its swap."""
    since = keeper.registry.json("adapters/sums/aliases/production.json")["since"].replace(":", "")
    for key in keeper.keys(f"{EVENTS}{since}"):
        keeper.registry.remove(key)


def events_ahead(keeper: Keeper, good: str) -> None:
    """Each event once more, in the year 9999."""
    for key in keeper.keys(EVENTS):
        if key.endswith(".json") and "2026-" in key and not any(junk in key for junk in ("-x", "-y", "NAME")):
            event = keeper.registry.json(key)
            ahead = f"9999{event['time'][4:]}"
            name = f"{EVENTS}{ahead.replace(':', '')}-{event['id']}.json"
            keeper.registry.write(name, json.dumps({**event, "time": ahead}).encode())


@pytest.mark.parametrize(
    "to_it", [pytest.param(False, marks=pytest.mark.slow), True], ids=["to the one before", "by first digits"]
)
@pytest.mark.parametrize("wrong", [an_event_gone, events_ahead, junk])
def test_production_goes_back_whatever_lies_there(
    keeper: Keeper, good: str, wrong: Callable[[Keeper, str], None], to_it: bool
) -> None:
    wrong(keeper, good)
    goes_back(keeper, good, *(["--to", good[:8]] if to_it else []))


@pytest.mark.slow
def test_production_goes_back_past_a_damaged_index(keeper: Keeper, good: str) -> None:
    for number in range(NUMBER_OF_AN_INDEX):
        body = {"version": good, "alias": "staging", "run_id": f"r{number}", "reasons": ["worse"]}
        append_event(keeper.store, "sums", "refused", body, at=f"2026-01-01T00:00:00.{number:06}Z")
    keeper.does("fineloop adapters history sums -c sums.toml")
    entries = json.loads(gzip.decompress(keeper.registry.read(f"{INDEX}adapter.json.gz")))["events"]
    assert len(entries) > NUMBER_OF_AN_INDEX
    forged = {name: entry.replace('"refused"', '"promoted"') for name, entry in entries.items()}
    for body in (b"junk", gzip.compress(json.dumps({"events": forged, "versions": forged}).encode())):
        keeper.registry.write(f"{INDEX}adapter.json.gz", body)
        goes_back(keeper, good, "--to", good[:8])
        promote(keeper.store, "sums", keeper.publishes("bad"))


def test_production_goes_back_from_an_alias_of_a_clock_far_ahead(keeper: Keeper, good: str) -> None:
    """From here on all that moves it is dated so: this test is the last of the file."""
    key = "adapters/sums/aliases/production.json"
    keeper.registry.write(
        key, json.dumps({**keeper.registry.json(key), "since": "9999-12-31T23:59:59.999999Z"}).encode()
    )
    goes_back(keeper, good)
