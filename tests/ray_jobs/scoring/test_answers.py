import math

import pytest

from components.records.steps import PairedDifference
from components.shared.metrics import METRICS
from ray_jobs.scoring.answers import (
    MARKS,
    MAX_CLASSES,
    OTHER,
    Score,
    as_columns,
    changed_share,
    confusion,
    cut_short,
    label_accuracy,
    metrics,
    paired_difference,
)


def score(nll: float, other: float | None = None, match: bool = False, f1: float = 0.0) -> Score:
    return Score(nll, other, text="", marks={"exact_match": float(match), "token_f1": f1})


def test_losses_are_per_answer_token_and_not_per_record():
    found = metrics([score(1.0, 5.0, True, 1.0), score(5.0, 7.0)], [1, 5])
    assert found["loss"] == pytest.approx(1.0)
    assert found["perplexity"] == pytest.approx(math.e)
    assert found["exact_match"] == 0.5
    assert found["token_f1"] == 0.5
    assert found["prompt_gain"] == pytest.approx(1.0)
    assert found["answer_loss"] == pytest.approx(3.0)
    assert found["answer_prompt_gain"] == pytest.approx(3.0)


def test_prompt_gain_is_absent_where_it_was_not_measured():
    assert metrics([score(1.0)], [1])["prompt_gain"] is None


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_a_lower_loss_is_a_positive_difference(metric):
    found = paired_difference([score(1.0)] * 4, [score(2.0)] * 4, [1] * 4, metric)
    assert found is not None
    assert found.difference > 0
    assert found.records == 4


def test_the_interval_is_that_of_the_paired_differences():
    # Records differ far more from each other than the models do: a paired interval stays narrow.
    base = [float(i) for i in range(200)]
    found = paired_difference(
        [score(x) for x in base], [score(x + 0.5 + 0.1 * (i % 2)) for i, x in enumerate(base)], [1] * 200, "loss"
    )
    assert found is not None
    low, high = found.ci95
    assert found.difference == pytest.approx(0.55)
    assert 0.53 < low < 0.55 < high < 0.57


def test_the_interval_spans_zero_when_neither_is_better():
    ours = [score(0, match=i % 2 == 0) for i in range(100)]
    theirs = [score(0, match=i % 2 == 1) for i in range(100)]
    found = paired_difference(ours, theirs, [1] * 100, "exact_match")
    assert found is not None
    low, high = found.ci95
    assert low < 0 < high


def test_a_difference_on_one_record_of_many_has_no_interval_and_is_read_back():
    theirs = [score(1.0, f1=1.0)] * 30
    found = paired_difference([score(1.0, f1=0.5), *theirs[1:]], theirs, [1] * 30, "token_f1")
    assert found is not None
    assert found.ci95 is None
    assert found == PairedDifference.model_validate_json(found.model_dump_json())


def test_there_is_no_difference_where_a_number_is_not_finite():
    assert paired_difference([score(math.nan)] * 4, [score(1.0)] * 4, [1] * 4, "loss") is None


def test_every_metric_of_the_table_is_measured():
    on_answers = {key for key, metric in METRICS.items() if not metric.probe}
    every = Score(1.0, 5.0, "", dict.fromkeys(MARKS, 1.0))
    assert metrics([every], [1]).keys() == on_answers
    columns = as_columns("base", [every]).keys()
    assert columns == {"base_answer", "base_nll", "base_other_prompt_nll", *(f"base_{key}" for key in MARKS)}


def test_the_confusion_of_labels_sums_to_their_accuracy() -> None:
    references = ["Skin", "Skin", "Skin", "Blood", "Blood", "Ear"] * 2
    answers = ["skin.", "Skin", "Ear", "BLOOD", "bones", '"Ear"'] * 2
    found = confusion(references, answers)
    assert found is not None
    assert found["labels"] == ["Skin", "Blood", "Ear", OTHER]
    right = sum(row[place] for place, row in enumerate(found["counts"][:-1]))
    marks = [label_accuracy(*each) for each in zip(answers, references, strict=True)]
    assert right == sum(marks) == 8


def test_answers_are_counted_by_what_was_expected() -> None:
    found = confusion(["a", "a", "b", "b "], ["a", "b", "b", "something else"])
    assert found == {"labels": ["a", "b", OTHER], "counts": [[1, 1, 0], [0, 1, 1], [0, 0, 0]]}


def test_classes_that_only_their_writing_tells_apart_are_counted_apart() -> None:
    found = confusion([">50K", "<=50K", "Mg", "mg"] * 2, ["<=50K", "<=50K.", "mg", "mg"] * 2)
    assert found is not None
    assert found["labels"] == [">50K", "<=50K", "Mg", "mg", OTHER]
    assert [row[:-1] for row in found["counts"][:-1]] == [[0, 2, 0, 0], [0, 2, 0, 0], [0, 0, 0, 2], [0, 0, 0, 2]]


@pytest.mark.parametrize(
    "references", [["a"] * 4, ["a", "b", "c", "c"], [str(n // 2) for n in range(2 * (MAX_CLASSES + 1))]]
)
def test_answers_that_are_no_classes_have_no_confusion(references: list[str]) -> None:
    assert confusion(references, references) is None


def test_an_answer_has_changed_where_its_words_have() -> None:
    before, after = (
        [Score(1.0, None, text, {}) for text in texts] for texts in (["a", "b ", "c", "d"], ["a", "b", "C", "e"])
    )
    assert changed_share(before, after) == 0.5


def test_references_that_no_answer_can_reach_are_counted():
    said = cut_short([8, 9, 410, 3], 8)
    assert said is not None
    assert said.startswith("2 of 4 references are longer than evaluate.max_new_tokens 8: no answer to them is an exact")
    assert cut_short([8, 9, 410, 3], 410) is cut_short([1], None) is None
