"""Which records are new to two versions: those that neither of their trainings, nor an earlier look, has seen."""

from collections.abc import Callable
from typing import Any

import pytest

from components.config.schema import RunConfig
from components.prepare.dataset import load_split
from components.prepare.newer import publish_newer
from components.prepare.prepare import prepare
from components.registry import aliases, between_runs
from components.registry.versions import publish_version
from components.shared.errors import ObjectMissing, UnknownName, UserError
from components.step.step import StepRun
from components.store.store import Store

Write = Callable[..., str]


def rows(start: int, end: int, answer: str = "answer") -> list[Any]:
    return [{"id": i, "prompt": f"question {i}", "completion": f"{answer} {i % 7}"} for i in range(start, end)]


@pytest.fixture
def train(store: Store, write_rows: Write, run_config: Callable[..., RunConfig]) -> Callable[..., str]:
    """Prepare these rows, and publish and promote a version of them."""

    def run(run_id: str, data: list[Any], parents: tuple[str, ...] = (), **keys: Any) -> str:
        source = write_rows(data, f"{run_id}.jsonl")
        found = prepare(run_config(source, eval_share=0.3, **keys), store)
        lineage = {"run_id": run_id, "dataset": {"dataset_id": found.dataset_id}, "parents": list(parents)}
        files = {"adapter_model.safetensors": run_id.encode(), "adapter_config.json": b"{}"}
        version = publish_version(store, "test", files, lineage=lineage).version
        aliases.promote(store, "test", version)
        return version

    return run


@pytest.fixture
def newer(store: Store, run_config: Callable[..., RunConfig]) -> Callable[..., set[str]]:
    """The ids of what is new in this file."""

    def find(source: str, *, run_id: str = "look", check: Any = None, evaluate: Any = None, **data: Any) -> set[str]:
        config = run_config(source, **data)
        sections = {"check": check or {}, "evaluate": evaluate or {}}
        changes = {name: getattr(config, name).model_copy(update=change) for name, change in sections.items()}
        step = StepRun("newer", run_id, config.model_copy(update=changes), store)
        uri = publish_newer(step)
        return {record.id for record in load_split(store, uri, "eval")} if uri else set()

    return find


def ids(*spans: range) -> set[str]:
    return {str(number) for span in spans for number in span}


def test_what_either_was_trained_or_tested_on_is_not_new(train: Any, newer: Any, write_rows: Write) -> None:
    train("first", rows(0, 60))
    train("second", rows(50, 100))
    assert newer(write_rows(rows(0, 140))) == ids(range(100, 140))
    assert newer(write_rows(rows(0, 140)), check={"against": "base"}) == ids(range(50), range(100, 140))
    assert newer(write_rows(rows(0, 100))) == newer(write_rows(rows(0, 101))) == set()  # one is too few to compare on
    assert newer(write_rows(rows(50, 60, "another"))) == ids(range(50, 60))


def test_what_its_parent_was_trained_on_is_not_new(store: Store, train: Any, newer: Any, write_rows: Write) -> None:
    oldest = train("oldest", rows(0, 60))
    train("other", rows(200, 260))
    train("grown", rows(60, 100), parents=(store.uri(f"adapters/test/versions/{oldest}"),))
    assert newer(write_rows(rows(0, 110))) == ids(range(100, 110))


def test_what_a_run_read_and_left_out_is_not_new(store: Store, train: Any, newer: Any, write_rows: Write) -> None:
    train("first", rows(0, 60))
    source = write_rows(rows(60, 80))
    assert newer(source) == ids(range(60, 80))
    consumed = between_runs.runs.read(store, "look", between_runs.Consumed)
    contents = between_runs.consumed_contents(store, consumed)
    between_runs.note_consumed(store, "first", as_of="2026", sources={}, contents=contents)
    assert newer(source) == set()


def test_a_group_that_was_trained_on_is_not_new(train: Any, newer: Any, write_rows: Write) -> None:
    grouped = [row | {"session": f"s{row['id'] // 10}"} for row in rows(0, 100)]
    train("first", grouped[:55], group="session")
    assert newer(write_rows(grouped), group="session") == ids(range(60, 100))


def test_a_look_takes_so_many_and_leaves_the_others_to_later_ones(train: Any, newer: Any, write_rows: Write) -> None:
    train("first", rows(0, 60))
    source = write_rows(rows(60, 100))
    few = newer(source, evaluate={"records": 10, "max_records": 25})
    assert len(few) == 25
    assert newer(source, evaluate={"records": 10, "max_records": 25}) == few  # the same until a look is logged


def test_a_dataset_that_is_gone_leaves_unknown_what_is_new(
    store: Store, train: Any, newer: Any, write_rows: Write
) -> None:
    train("first", rows(0, 60))
    store.delete([info.key for info in store.list("datasets/")])
    with pytest.raises(ObjectMissing):
        newer(write_rows(rows(0, 100)))


def test_there_has_to_be_something_to_compare(train: Any, newer: Any, write_rows: Write) -> None:
    source = write_rows(rows(0, 100))
    with pytest.raises(UnknownName, match="promote a version first"):
        newer(source)
    held = train("first", rows(0, 60))
    with pytest.raises(UserError, match="name another version"):
        newer(source, check={"against": held})
    with pytest.raises(UnknownName):
        newer(source, check={"against": "v123456789abcdef"})
