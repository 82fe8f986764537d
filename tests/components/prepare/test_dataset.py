from components.prepare.dataset import Message, Record, dataset_id

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
    ]
    assert len({dataset_id(train, evaluation) for train, evaluation in variants}) == len(variants)
