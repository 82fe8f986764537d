import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from components.prepare.dataset import Message, Record
from ray_jobs.text.batching import AT_ONCE, IGNORED, NO_RECORD, TokenizedSplit, collate, plan_epoch, share, tokenize
from tests.models import chat_families
from tests.models.chat_families import FAMILIES, chat_of


@pytest.fixture(scope="module")
def chat(tiny_base: Path):
    return chat_of(tiny_base)


def of_family(name: str, folder: Path):
    return chat_of(chat_families.build(folder, FAMILIES[name]))


def record(prompt: str, answer: str, name: str = "r") -> Record:
    return Record(name, [Message("user", prompt)], answer)


def test_labels_are_the_answer_and_its_end_and_nothing_else(chat):
    split = tokenize([record("sky", "blue"), record("a longer prompt", "red")], chat, 64)
    batch = collate(split, [0, 1], chat.pad)
    tokens, labelled, length = batch["input_ids"][0], batch["labels"][0] != IGNORED, int(split.lengths[0])
    assert chat.tokenizer.decode(tokens[labelled]) == "blue<|end|>"
    assert chat.tokenizer.decode(tokens[:length][~labelled[:length]]) == "<|user|>sky<|end|>\n<|assistant|>"
    assert (tokens[length:] == chat.pad).all()


@pytest.mark.parametrize("family", ["chatml", "llama-3", "mistral", "gemma", "qwen-3", "none"])
def test_what_is_left_of_a_long_record_reads_as_a_record_of_its_own(family, tmp_path):
    """The judge is the same function on a short record: what a long one kept of its text, read out of its tokens."""
    chat = of_family(family, tmp_path)
    text = " ".join(f"line {number}," for number in range(200)) + " what is it?"
    earlier = [Message("user", "hello"), Message("assistant", "hi")]
    split = tokenize([Record("r", [*earlier, Message("user", text)], "paper")], chat, 160)
    assert (split.cut, split.too_long) == (["r"], [])
    assert 140 < split.lengths[0] <= 160
    written = chat.tokenizer.decode(split.tokens)
    left = next(text[begin:] for begin in range(len(text)) if text[begin:] in written)
    assert left.endswith("what is it?")
    assert tokenize([record(left, "paper")], chat, 160).tokens.tolist() == split.tokens.tolist()


def test_an_answer_that_names_the_token_that_ends_it_is_left_out(chat):
    asked = [Message("user", "How does a turn end?"), Message("assistant", "By <|end|>."), Message("user", "Say it")]
    records = [record("sky", "blue", "a"), record("What ends a turn?", "The text <|end|> does.", "b")]
    earlier = Record("c", asked, "I did.")
    assert tokenize(records, chat, 96).ids == ["a"]
    assert tokenize(records, chat, 96).too_long == ["b"]
    assert tokenize([earlier], chat, 96).ids == ["c"]
    assert tokenize([earlier], chat, 96, "all").too_long == ["c"]


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("count", [3, 16, 50, 333])
def test_an_epoch_holds_every_record_and_whole_batches(count, group_by_length):
    lengths = np.random.default_rng(0).integers(5, 50, count)
    batches = plan_epoch(lengths, batch_size=16, group_by_length=group_by_length, seed=1, epoch=0)
    assert {len(batch) for batch in batches} == {16}
    assert len(batches) == -(-count // 16)
    assert set(np.concatenate(batches)) == set(range(count))


def test_the_order_follows_from_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(5, 50, 100)

    def order(seed: int, epoch: int) -> list[int]:
        plan = plan_epoch(lengths, batch_size=16, group_by_length=True, seed=seed, epoch=epoch)
        return np.concatenate(plan).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_grouping_by_length_leaves_less_padding():
    lengths = np.random.default_rng(0).integers(5, 200, 2000)

    def padded(group_by_length: bool) -> int:
        plan = plan_epoch(lengths, batch_size=16, group_by_length=group_by_length, seed=0, epoch=0)
        return sum(int(lengths[batch].max()) * len(batch) for batch in plan)

    assert padded(True) < 0.7 * padded(False)


@pytest.mark.parametrize("max_tokens", [0, 1, 100, 10_000])
@pytest.mark.parametrize("num_workers", [3, 5, 12])
def test_workers_too_many_for_even_shares_leave_places_empty(max_tokens, num_workers):
    batch = np.random.default_rng(0).permutation(200)[:16]
    lengths = np.arange(5, 205)
    rounds = share(batch, lengths, micro_batch_size=4, max_tokens=max_tokens, num_workers=num_workers)
    dealt = np.concatenate([each.ravel() for each in rounds])
    assert sorted(dealt[dealt != NO_RECORD]) == sorted(batch)
    assert all(each.shape[0] == num_workers for each in rounds)
    assert len(dealt) < len(batch) + num_workers * (1 if max_tokens else 4)
    assert max_tokens or {each.shape[1] for each in rounds} <= {1, 2, 3, 4}


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("max_tokens", [1, 100, 250, 10_000])
def test_a_batch_is_dealt_out_by_tokens_to_all_workers_alike(max_tokens, num_workers):
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, 1000)
    batch = rng.permutation(1000)[:32]
    rounds = share(batch, lengths, micro_batch_size=1, max_tokens=max_tokens, num_workers=num_workers)
    assert sorted(np.concatenate([each.ravel() for each in rounds])) == sorted(batch)
    assert all(each.shape[0] == num_workers for each in rounds)  # so that ZeRO-3 gathers for everybody at once
    for each in rounds:
        padded = [each.shape[1] * lengths[records].max() for records in each]
        assert max(padded) <= max_tokens or each.shape[1] == 1
    for now, then in itertools.pairwise(rounds):  # and none has room for a record more
        assert (now.shape[1] + 1) * lengths[now].max() > max_tokens
        assert lengths[then].max() <= lengths[now].min()
    if max_tokens == 10_000:
        assert len(rounds) == 1


def test_an_answer_that_would_merge_with_its_prompt_leaves_the_prompts_tokens_alone(chat):
    merging = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<e>": 3}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<e>", pad_token="<e>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = dataclasses.replace(chat, tokenizer=tokenizer, stops=frozenset({3}), end_of_turn=3)
    split = tokenize([record("aa", "ba")], chat, 64)
    assert split.tokens.tolist() == [0, 0, 1, 0, 3]
    assert split.num_prompt_tokens.tolist() == [2]


ODD = ["blue", " deep  blue", "\n\nblue\n", "1\n2", "ê\u00a0東京 🙂", "<|end|> of it", "'s", "_a", "   "]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_reads_as_it_does_alone_and_an_answer_as_it_follows_it_whatever_stands_at_the_border(tmp_path, name):
    chat = of_family(name, tmp_path)

    def read(text: str) -> list[int]:
        return list(chat.tokenizer(text, add_special_tokens=False)["input_ids"])

    records = [record(before, after) for before, after in itertools.product(ODD, ODD) if after.strip()]
    records = [each for each in records if not chat.ends_early(each)]
    split = tokenize(records, chat, 4096)
    for row, each in enumerate(records):
        prompt, answer = chat.rows(each)[0]
        alone, whole = read(prompt), read(prompt + answer)
        follows = whole[len(alone) :] if whole[: len(alone)] == alone else read(answer)
        assert split.prompt(row).tolist() == alone
        assert follows[: len(split.answer(row)) - 1] == split.answer(row).tolist()[:-1]


TALK = Record(
    "talk",
    [
        *(Message("system", "Be brief."), Message("user", "sky"), Message("assistant", "blue")),
        *(Message("user", "grass"), Message("assistant", "green"), Message("user", "coal")),
    ],
    "black",
)


def learned(split: TokenizedSplit, chat) -> list[list[str]]:
    """The runs of labelled tokens of each row, as text."""
    rows = []
    for start, end in zip(split.offsets, split.offsets[1:], strict=False):
        flags = split.labelled[start:end]
        borders = np.flatnonzero(np.diff(flags)) + 1
        runs = zip(np.split(split.tokens[start:end], borders), np.split(flags, borders), strict=True)
        rows.append([chat.tokenizer.decode(tokens) for tokens, labelled in runs if labelled[0]])
    return rows


def test_the_last_answer_alone_is_learned_unless_all_are_asked_for(chat):
    assert learned(tokenize([TALK], chat, 256), chat) == [["black<|end|>"]]
    everything = tokenize([TALK], chat, 256, "all")
    assert learned(everything, chat) == [["blue<|end|>", "green<|end|>", "black<|end|>"]]
    assert everything.num_answer_tokens.tolist() == [len("bluegreenblack") + 3]
    last = tokenize([TALK], chat, 256)
    assert everything.tokens.tolist() == last.tokens.tolist()
    assert everything.num_prompt_tokens.tolist() == last.num_prompt_tokens.tolist()


def unlearned(talk: Record, *places: int) -> Record:
    turns = [turn._replace(more='{"weight":0}') if at in places else turn for at, turn in enumerate(talk.prompt)]
    return dataclasses.replace(talk, prompt=turns)


@pytest.mark.parametrize("family", ["chatml", "mistral", "qwen-3"])
def test_a_turn_of_weight_0_is_read_and_not_learned(family, tmp_path):
    """The judge is the same conversation without weights: the same tokens, of which that turn's labels are gone."""
    chat = of_family(family, tmp_path)
    given = [unlearned(TALK, 4), unlearned(TALK, 2, 4)]
    everything, marked = tokenize([TALK], chat, 256, "all"), tokenize(given, chat, 256, "all")
    answers = [[text for row in learned(marked.take([place]), chat) for text in row] for place in range(len(marked))]
    blue, green, black = [text for row in learned(everything, chat) for text in row]
    assert [text for row in answers for text in row] == [blue, black, black]
    assert green not in "".join(itertools.chain(*answers))
    for loss_on in ("last", "all"):
        rows = {tokenize([each], chat, 256, loss_on).take([-1]).tokens.tobytes() for each in (TALK, *given)}
        assert len(rows) == 1
    (last,) = {tuple(map(tuple, learned(tokenize([each], chat, 256), chat))) for each in (TALK, *given)}
    assert last == ((black,),)
    long = dataclasses.replace(TALK, prompt=[Message("user", "hello"), Message("assistant", "<|end|>"), *TALK.prompt])
    assert not chat.ends_early(unlearned(long, 1), "all")


BEFORE, COAL = "<|system|>Be brief.<|end|>\n", "<|user|>coal<|end|>\n<|assistant|>black<|end|>"


@pytest.mark.parametrize(
    ("max_length", "text", "answers"),
    [
        (45, f"{BEFORE}<|user|>grass<|end|>\n<|assistant|>green<|end|>\n{COAL}", ["green<|end|>", "black<|end|>"]),
        (40, f"{BEFORE}{COAL}", ["black<|end|>"]),
        (26, f"{BEFORE}{COAL}", ["black<|end|>"]),
        (25, f"<|system|>Be brief<|end|>\n{COAL}", ["black<|end|>"]),
        # Where only the form is left of a prompt, its tokens are cut, and of an answer that is cut in two nothing is
        # learned.
        (22, f"<|assistant|>green<|end|>\n{COAL}", ["green<|end|>", "black<|end|>"]),
        (20, f"reen<|end|>\n{COAL}", ["black<|end|>"]),
    ],
)
def test_a_long_conversation_loses_its_oldest_exchanges_and_keeps_its_form(chat, max_length, text, answers):
    split = tokenize([TALK], chat, max_length, "all")
    assert chat.tokenizer.decode(split.tokens) == text
    assert split.cut == ["talk"]
    assert learned(split, chat) == [answers]


POLICY = "RULE ONE: never reveal prices. " + "And so on. " * 20
ASKED, LONG = "What does it cost?", "x" * 200 + "What does it cost?"


@pytest.mark.parametrize(
    ("system", "question", "max_length", "left", "is_cut"),
    [
        (POLICY, ASKED, 80, (POLICY[:44], ASKED), True),
        (POLICY[:30], LONG, 130, (POLICY[:30], LONG[-82:]), False),
        (POLICY, LONG, 130, (POLICY[:48], LONG[-64:]), True),
        (POLICY, LONG, 48, (POLICY[:8], LONG[-22:]), True),
    ],
)
def test_a_system_message_is_shortened_last_and_from_its_end(chat, system, question, max_length, left, is_cut):
    given = Record("r", [Message("system", system), Message("user", question)], "No answer.")
    split = tokenize([given], chat, max_length)
    kept, asked = left
    whole = f"<|system|>{kept}<|end|>\n<|user|>{asked}<|end|>\n<|assistant|>No answer.<|end|>"
    assert chat.tokenizer.decode(split.tokens) == whole
    assert (split.cut, split.cut_system) == (["r"], ["r"] if is_cut else [])


def test_where_a_template_rewrites_earlier_turns_each_answer_has_a_row(tmp_path):
    chat = of_family("qwen-3", tmp_path)
    split = tokenize([TALK], chat, 256, "all")
    assert split.ids == ["talk"] * 3
    assert learned(split, chat) == [["blue<|im_end|>"], ["green<|im_end|>"], ["black<|im_end|>"]]
    for before in range(3):
        prompt = chat.tokenizer.decode(split.prompt(before))
        turns = [{"role": turn.role, "content": turn.content} for turn in TALK.prompt[: 2 + 2 * before]]
        assert prompt == chat.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )


def test_many_records_are_tokenised_as_they_are_one_by_one(chat):
    records = [record("x" * (i % 7) + "sky", "b" * (1 + i % 60), str(i)) for i in range(2 * AT_ONCE + 3)]
    split = tokenize(records, chat, 64)
    alone = [tokenize([each], chat, 64) for each in records]
    for part in ("ids", "too_long", "tokens", "lengths", "num_prompt_tokens"):
        assert list(getattr(split, part)) == [value for each in alone for value in getattr(each, part)], part
