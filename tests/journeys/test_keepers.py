"""`fineloop adapters gc --delete` beside others: what a person, a run or a promotion is on its way to stays.

Commands are processes on one real S3 server; where the order of requests matters, a proxy before it holds one. What is
there before and after is judged by boto3's own listing of the bucket.
"""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pipelines.local.seaweedfs import Endpoint
from tests.doubles.faulty_proxy import FaultyProxy, Hold, faulty_proxy
from tests.doubles.jobs_api import stub_cluster
from tests.journeys.keeper import Keeper, ended, keeper_at
from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.e2e]
GC = "fineloop adapters gc --keep-last 0 --older-than-days 0 --delete -c sums.toml"


@pytest.fixture
def keeper(tmp_path: Path, s3_server: Endpoint) -> Keeper:
    return keeper_at(tmp_path / "keeper", s3_server)


@pytest.fixture
def proxy(s3_server: Endpoint) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_server.url) as made:
        yield made


@pytest.mark.full
def test_what_waits_for_a_person_and_what_a_run_is_on_its_way_with_stay(keeper: Keeper, s3_server: Endpoint) -> None:
    champion, start, unneeded = (keeper.publishes(weights) for weights in ("1.5", "1.4", "1.3"))
    keeper.does(f"fineloop adapters promote sums@{champion} -c sums.toml")
    with ExitStack() as stack:
        cluster = stack.enter_context(closing(stub_cluster(keeper.folder / "cluster", s3_server.environment())))
        keeper = keeper.on(cluster)
        waits = keeper.does("fineloop run -c sums.toml --set train.weight_decay=1.0 --json").answer
        assert waits["verdict"] == "needs approval"
        before = keeper.keys()
        under_way = keeper.begins(
            f"fineloop run -c sums.toml --run-id under-way --set data.source={keeper.folder}/more.jsonl"
            f" --set method.dropout=0.3 --set train.start_from=sums@{start[:6]}"
        )
        stack.enter_context(under_way)
        stack.callback(under_way.send_signal, signal.SIGINT)
        wait_until((cluster.directory / "hanging").exists)
        begun = keeper.keys() - before
        assert {key.split("/")[0] for key in begun} == {"runs", "datasets"}

        gone = keeper.does(f"{GC} --json").answer
        assert [each["name"] for each in gone["removals"] if each["kind"] == "version"] == [f"sums@{unneeded}"]
        assert begun <= keeper.keys()
        assert keeper.files(unneeded) == set()
        for version in (champion, start, waits["version"]):
            assert keeper.files(version)
    keeper.does(f"fineloop adapters approve sums@{waits['version']} --by ada --reason 'read them' -c sums.toml")
    assert keeper.holder() == waits["version"]
    keeper.does("fineloop adapters audit sums -c sums.toml")


@pytest.fixture
def two(keeper: Keeper) -> tuple[str, str]:
    """The version in production, and another."""
    one, other = keeper.publishes("1"), keeper.publishes("2")
    keeper.does(f"fineloop adapters promote sums@{one} -c sums.toml")
    return one, other


@pytest.mark.slow
def test_a_version_that_takes_an_alias_while_it_is_being_removed_stays_whole(
    keeper: Keeper, proxy: FaultyProxy, two: tuple[str, str]
) -> None:
    _, other = two
    whole = keeper.files(other)
    removal = Hold("POST", "delete")
    proxy.holds.append(removal)
    collector = keeper.begins(GC, AWS_ENDPOINT_URL=proxy.url)
    assert removal.reached.wait(PATIENCE_S)
    keeper.does(f"fineloop adapters promote sums@{other} -c sums.toml")
    removal.let_go.set()
    assert ended(collector)[0] == 0
    assert (keeper.holder(), keeper.files(other)) == (other, whole)
    keeper.does("fineloop adapters audit sums -c sums.toml")


def test_whichever_of_removal_and_promotion_is_answered_late_no_alias_points_at_nothing(
    keeper: Keeper, proxy: FaultyProxy, two: tuple[str, str]
) -> None:
    one, other = two
    swap = Hold("PUT", "aliases/production")
    proxy.holds.append(swap)
    promoter = keeper.begins(f"fineloop adapters promote sums@{other} -c sums.toml", AWS_ENDPOINT_URL=proxy.url)
    assert swap.reached.wait(PATIENCE_S)  # it is held before its swap
    # Not before: the promotion tries the store first, and deletes what it wrote for that.
    removal = Hold("POST", "delete", is_answered=True)
    proxy.holds.append(removal)
    collector = keeper.begins(GC, AWS_ENDPOINT_URL=proxy.url)
    assert removal.reached.wait(PATIENCE_S)  # the manifest is gone, and gc has not looked at the aliases again
    swap.let_go.set()
    assert ended(promoter)[0] == 1
    removal.let_go.set()
    assert ended(collector)[0] == 0
    assert keeper.holder() == one
    keeper.does("fineloop adapters audit sums -c sums.toml")
