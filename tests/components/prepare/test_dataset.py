from components.prepare.dataset import Message, Record, load_split
from components.store import folders
from tests.doubles.datasets import dataset_id, publish

A = Record("a", [Message("user", "p")], "x")
B = Record("b", [Message("system", "s"), Message("user", "p")], "y")


def test_the_id_is_fixed_by_the_records() -> None:
    assert dataset_id([A], [B]) == dataset_id([Record("a", [Message("user", "p")], "x")], [B])
    assert dataset_id([A], [B]) == "d1770dff0ee6de82"


def test_the_id_changes_with_anything_that_training_or_evaluation_sees() -> None:
    variants = [
        ([A], [B]),
        ([B], [A]),
        ([A, B], []),
        ([Record("a", [Message("user", "p")], "z")], [B]),
        ([Record("a", [Message("user", "q")], "x")], [B]),
        ([Record("a", [Message("system", "p")], "x")], [B]),
        ([Record("c", [Message("user", "p")], "x")], [B]),
        ([Record("a", [Message("user", "p")], "x", group="g")], [B]),
    ]
    assert len({dataset_id(train, evaluation) for train, evaluation in variants}) == len(variants)


def test_tools_calls_and_groups_survive_the_store(store) -> None:
    called = Message("assistant", "", '{"tool_calls":[{"type":"function","function":{"name":"f","arguments":{}}}]}')
    result = Message("tool", "rain", '{"tool_call_id":"call12345"}')
    talk = Record("c", [Message("user", "p"), called, result], "x", tools='[{"name":"f"}]')
    asks = Record("d", [Message("user", "p")], "", calls='[{"function":{"name":"f","arguments":{}}}]')
    grouped = Record("e", [Message("user", "p")], "x", group="g")
    uri = publish(store, train=[A, talk], evaluation=[asks, grouped, B]).uri
    assert load_split(store, uri, "train") == [A, talk]
    assert load_split(store, uri, "eval") == [asks, grouped, B]


def test_what_was_made_of_a_dataset_that_is_gone_is_no_part_of_it_when_it_comes_again(store) -> None:
    """Whoever removed it was cut off after the manifests."""
    folder = publish(store, train=[A], evaluation=[B])
    key = store.key(folder.uri)
    files = folders.read_manifest(store, key).files
    store.put(f"{key}/tokens/0123/tokens.npy", b"1")
    store.delete([f"{key}/manifest.json"])
    assert publish(store, train=[A], evaluation=[B]) == folder
    assert folders.read_manifest(store, key).files == files
