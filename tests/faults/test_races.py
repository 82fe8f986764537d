"""Writers at once: one of them wins, the others learn which did, and no reported write gets lost."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from components.registry.aliases import Cause, promote, read_alias, rollback
from components.registry.event_log import Event, events, moves
from components.registry.versions import publish_version, resolve, verify_version
from components.shared.errors import AliasConflict
from components.store.store import Store


def at_once(*actions: Callable[[], Any]) -> list[Any]:
    """What each gives, all begun together; an AliasConflict is an answer."""
    barrier = threading.Barrier(len(actions))

    def begun(action: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return action()
        except AliasConflict as conflict:
            return conflict

    with ThreadPoolExecutor(len(actions)) as pool:
        return [each.result() for each in [pool.submit(begun, action) for action in actions]]


@pytest.mark.parametrize(
    ("promoters", "rounds"), [(5, 3), pytest.param(16, 20, marks=pytest.mark.full)], ids=["few", "many"]
)
def test_of_many_promoters_one_wins_each_round_and_the_others_learn_who(
    store: Store, publish, assert_sound, promoters: int, rounds: int
) -> None:
    versions = [publish(store, f"w{number}") for number in range(promoters)]
    held = publish(store, "first")
    reported = [promote(store, "icd", held)]
    for number in range(rounds):
        candidates = [version for version in versions if version != held]

        def move(version: str, expected: str = held, number: int = number) -> Event:
            return promote(store, "icd", version, expected=expected, cause=Cause(f"run-{number}-{version}"))

        answers = at_once(*[lambda version=version: move(version) for version in candidates])
        (won,) = [answer for answer in answers if isinstance(answer, Event)]
        lost = [answer for answer in answers if isinstance(answer, AliasConflict)]
        assert len(lost) == len(candidates) - 1
        held = won.body["to"]
        assert {conflict.holder["version"] for conflict in lost if conflict.holder} == {held}
        reported.append(won)
    assert_sound(store, reported=reported)
    assert len(moves(events(store, "icd"), "production")) == rounds + 1


@pytest.mark.parametrize(("each", "rounds"), [(3, 2), pytest.param(8, 20, marks=pytest.mark.full)], ids=["few", "many"])
def test_promotions_and_rollbacks_at_once_leave_one_chain(
    store: Store, publish, assert_sound, each: int, rounds: int
) -> None:
    versions = [publish(store, f"w{number}") for number in range(each + 2)]
    reported = [promote(store, "icd", version) for version in versions[:2]]
    for _ in range(rounds):
        pointer = read_alias(store, "icd", "production")
        up = [partial(promote, store, "icd", version, expected=pointer.version) for version in versions[2:]]
        down = [partial(rollback, store, "icd", to=versions[0], expected=pointer.version)] * each
        answers = at_once(*up, *down)
        reported += [answer for answer in answers if isinstance(answer, Event)]
    assert_sound(store, reported=reported)


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.full)])
def test_two_publishers_of_one_version_with_other_files_beside_it_leave_it_whole(store: Store, rounds: int) -> None:
    for number in range(rounds):

        def publisher(own: int, number: int = number) -> str:
            files = {"adapter_model.safetensors": b"weights %d" % number, "adapter_config.json": b"{}"}
            files |= {"README.md": b"by %d " % own * (1 + own), f"only-{own}.txt": b"x"}
            return publish_version(store, "icd", files, lineage={"run_id": f"run-{own}"}).version

        one, two = at_once(lambda: publisher(1), lambda: publisher(2))
        assert one == two
        verify_version(store, resolve(store, f"icd@{one}"))
