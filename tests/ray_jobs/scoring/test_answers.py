"""What an answer is worth, against what the field's own programs say, and what follows for all answers."""

import itertools
import math
import random

import pytest

from components.records.steps import PairedDifference
from components.shared.errors import ConfigError, DataError
from components.shared.metrics import METRICS, alike
from ray_jobs.scoring import answers
from ray_jobs.scoring.answers import (
    MARKS,
    MAX_CLASSES,
    OTHER,
    Score,
    as_columns,
    changed_share,
    confusion,
    cut_short,
    exact_match,
    json_valid,
    label_accuracy,
    metrics,
    named,
    paired_difference,
    rouge_l,
    token_f1,
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


def test_the_interval_is_that_of_the_paired_differences():
    # Records differ far more from each other than the models do: a paired interval stays narrow.
    base = [float(i) for i in range(200)]
    found = paired_difference(
        [score(x) for x in base], [score(x + 0.5 + 0.1 * (i % 2)) for i, x in enumerate(base)], [1] * 200, "loss"
    )
    low, high = found.ci95
    assert found.records == 200
    assert found.difference == pytest.approx(0.55)  # a lower loss is a positive one
    assert 0.53 < low < 0.55 < high < 0.57


def test_a_difference_on_one_record_of_many_has_no_interval_and_is_read_back():
    theirs = [score(1.0, f1=1.0)] * 30
    found = paired_difference([score(1.0, f1=0.5), *theirs[1:]], theirs, [1] * 30, "token_f1")
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
    assert found["labels"] == ["Skin", "Blood", "Ear", OTHER]
    assert found["counts"] == [[4, 0, 2, 0], [0, 2, 0, 2], [0, 0, 2, 0], [0, 0, 0, 0]]  # a row for what was expected
    right = sum(row[place] for place, row in enumerate(found["counts"][:-1]))
    marks = [label_accuracy(*each) for each in zip(answers, references, strict=True)]
    assert right == sum(marks) == 8


def test_classes_that_only_their_writing_tells_apart_are_counted_apart() -> None:
    found = confusion([">50K", "<=50K", "Mg", "mg"] * 2, ["<=50K", "<=50K.", "mg", "mg"] * 2)
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
    told = "2 of 4 references are longer than evaluate.max_new_tokens 8"
    assert cut_short([8, 9, 410, 3], 8).startswith(told)
    assert cut_short([8, 9, 410, 3], 410) is cut_short([1], None) is None


@pytest.mark.parametrize(
    ("mark", "answer", "reference", "expected"),
    [
        # Equal but for white space and Unicode form.
        (exact_match, " Skin\n", "Skin", 1),
        (exact_match, "e\u0301", "\u00e9", 1),
        (exact_match, "skin", "Skin", 0),
        # torchmetrics 1.9.0 (functional/text/squad.py, _compute_f1_score), whose words are the official scripts'.
        (token_f1, "The cat, sat!", "the cat sat", 1.0),
        (token_f1, "the cat", "the cat sat", 2 / 3),
        (token_f1, "a a b", "a c", 0.0),
        (token_f1, "don't", "dont", 1.0),
        (token_f1, "\N{THUMBS UP SIGN}", "\N{THUMBS DOWN SIGN}", 0.0),
        (token_f1, "Denver Broncos", "The Denver Broncos", 1.0),
        (token_f1, "state-of-the-art", "state of the art", 0.0),
        (token_f1, "ÉCOLE", "école", 1.0),
        # compute_f1 of evaluate-v2.0.py: where either has no words, whether the other has none either.
        (token_f1, "", "", 1.0),
        (token_f1, "A", "A", 1.0),
        (token_f1, "a", "the", 1.0),
        (token_f1, "the", "cat", 0.0),
        # rouge-score 0.1.2's rougeL fmeasure, without stemming; the first pair is its README's.
        (rouge_l, "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog", 0.588235),
        (rouge_l, "the cat the cat sat", "the cat sat on the cat", 0.727273),
        (rouge_l, "", "a b", 0.0),
        (rouge_l, "state-of-the-art", "state of the art", 1.0),
        (rouge_l, "Новообразования кожи", "новообразования крови", 0.5),
        (rouge_l, "the gunman kill police", "police killed the gunman", 0.5),
        # RFC 8259, which knows no NaN, no comments, no single quotes and no trailing comma.
        (json_valid, '{"a": [1, 2.5e3, null]}', "whatever", 1),
        (json_valid, "", "whatever", 0),
        (json_valid, '{"a": 1,}', "whatever", 0),
        (json_valid, '{"a": NaN}', "whatever", 0),
        (json_valid, "-Infinity", "whatever", 0),
        (json_valid, '```json\n{"a": 1}\n```', "whatever", 0),
        (json_valid, "[" * 100_000, "whatever", 0),
        # The same label, however it is written.
        (label_accuracy, "skin.", "Skin", 1),
        (label_accuracy, ' "Skin"', "Skin", 1),
        (label_accuracy, "STRASSE", "straße", 1),
        (label_accuracy, "**Skin**", "Skin", 1),
        (label_accuracy, "\u76ae\u80a4\u3002", "\u76ae\u80a4", 1),
        (label_accuracy, "Skin and hair", "Skin", 0),
        # An object or an array where one is asked for.
        (json_valid, '{"dose": 5}', '{"dose": 6}', 1),
        (json_valid, "42", '{"dose": 6}', 0),
        (json_valid, "[1]", '{"dose": 6}', 0),
        (json_valid, "[]", "[1, 2]", 1),
        (json_valid, "42", "7", 1),
    ],
)
def test_a_mark_is_what_the_fields_own_programs_give(mark, answer, reference, expected):
    assert mark(answer, reference) == pytest.approx(expected, abs=1e-6)


def test_rouge_l_of_long_texts_is_rouge_scores_too():
    """200 pairs of up to 89 words drawn from six, whose sum rouge-score 0.1.2 gives."""
    rng = random.Random(0)
    total = 0.0
    for _ in range(200):
        answer, reference = (" ".join(rng.choices("abcdef", k=rng.randrange(1, 90))) for _ in range(2))
        total += rouge_l(answer, reference)
    assert total == pytest.approx(83.61908485986208, abs=1e-9)


# By hand: a mark belongs to its letter, and another mark makes another word.
@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("किताब", "कुतुब", 0.0),
        ("पानी", "पिन", 0.0),
        ("नई किताब", "नई कलम", 0.5),
        ("שָׁלוֹם", "שָׁלוֹם", 1.0),
        ("cafe\u0301 noir", "caf\u00e9 noir", 1.0),
    ],
)
def test_words_are_whole_where_a_script_writes_vowels_as_marks(answer, reference, expected):
    assert rouge_l(answer, reference) == token_f1(answer, reference) == expected


# By hand, a letter a word: common letters, and the letters in common in the same order, over their mean number.
@pytest.mark.parametrize(
    ("answer", "reference", "f1", "rouge"),
    [
        ("今天天气很好", "今天天气不错", 4 / 6, 4 / 6),
        ("今天天气很好。", "今天天气很好", 1.0, 1.0),
        ("好很", "很好", 1.0, 1 / 2),
        ("東京タワー", "東京 タワー", 1.0, 1.0),
        ("กิน", "กัน", 1 / 2, 1 / 2),
        ("COVID-19疫苗", "COVID-19病毒", 1 / 3, 2 / 4),
        ("ភាសាខ្មែរ", "ភាសាខ្មែរ", 1.0, 1.0),
    ],
)
def test_scripts_without_spaces_are_compared_letter_by_letter(answer, reference, f1, rouge):
    assert (token_f1(answer, reference), rouge_l(answer, reference)) == pytest.approx((f1, rouge))


@pytest.mark.parametrize(
    "labels",
    [
        (">50K", "<=50K"),
        ("A*", "A+", "A", "A-"),
        ("C", "C#", "C++"),
        ("-1", "1", "+1", ".1", "1 %"),
        ("<", ">", "+", "-", "?", "!", ":)", ":("),
        ("*", "**", "***"),
    ],
)
def test_signs_that_tell_labels_apart_count(labels):
    for answer, reference in itertools.product(labels, labels):
        assert label_accuracy(answer, reference) == (answer == reference), (answer, reference)


def test_labels_that_only_their_writing_tells_apart_have_to_be_written_the_same():
    labels = ("US", "us", "Yes!", "Yes?", "Skin")
    mark = named(["label_accuracy"], alike([*labels, "Skin "]))["label_accuracy"]
    for answer, reference in itertools.product(labels, labels):
        assert mark(answer, reference) == (answer == reference), (answer, reference)
    assert mark("skin.", "Skin") == 1
    assert mark("us.", "us") == 0


OWN = """
def brevity(answer, reference):
    return len(answer) <= len(reference)

def too_much(answer, reference):
    return 7

def broken(answer, reference):
    return answer.missing

CONSTANT = 1
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_own_marks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_of_the_configs_is_a_mark_like_the_others(own):
    found = answers.named(["loss", "exact_match", "my_own_marks:brevity"])
    assert found.keys() == {"exact_match", "my_own_marks:brevity"}
    assert found["my_own_marks:brevity"]("ab", "abc") == 1.0
    assert found["my_own_marks:brevity"]("abcd", "abc") == 0.0


@pytest.mark.parametrize("key", ["my_own_marks:nobody", "no_such_module:f", "my_own_marks:CONSTANT"])
def test_a_function_that_is_not_there_is_said_by_its_name(own, key):
    with pytest.raises(ConfigError, match=f"names the metric {key}, "):
        answers.named([key])


@pytest.mark.parametrize(
    ("key", "message"), [("my_own_marks:too_much", r"is 7\.0"), ("my_own_marks:broken", "failed: AttributeError")]
)
def test_a_function_that_gives_no_mark_stops_the_evaluation_with_the_answer(own, key, message):
    mark = answers.named([key])[key]
    with pytest.raises(DataError, match=rf"{key}\('ab', 'abc'\) {message}"):
        mark("ab", "abc")
