"""A model that knows the answers scores 1.0, and 0.0 against others, whatever family it comes from, though its
generation_config.json has penalties, as Qwen2.5-Instruct's."""

import dataclasses
import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from components.prepare.dataset import Message, Record
from ray_jobs.scoring.generation import greedy, score
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import collate, tokenize
from tests.models import chat_families
from tests.models.chat_families import FAMILIES, chat_of
from tests.models.tiny import COLOURS

# An answer that says a thing twice: a penalty on repeating shows.
ANSWERS = {thing: f"{colour}, {colour}" for thing, colour in COLOURS.items()}
THINGS = sorted(ANSWERS)
RIGHT = [Record(thing, [Message("user", thing)], ANSWERS[thing]) for thing in THINGS]
WRONG = [
    dataclasses.replace(record, answer=ANSWERS[other])
    for record, other in zip(RIGHT, [*THINGS[1:], THINGS[0]], strict=True)
]


def teach(model, chat, records) -> None:
    """Until it has them by heart."""
    batch = collate(tokenize(records, chat, 256), range(len(records)), chat.pad)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(400):
        losses = answer_nll(model.train(), batch["input_ids"], batch["labels"])
        if losses.max().item() < 0.1:
            return
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"it did not learn: loss {loss.item()}")


def exact_match(model, chat, records=RIGHT) -> float:
    split = tokenize(records, chat, 256)
    scores = score(model.eval(), chat, records, split, batch_size=4, max_new_tokens=96)
    return sum(each.marks["exact_match"] for each in scores) / len(scores)


def loaded(directory, family, **config):
    folder = chat_families.build(directory, family)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), chat_of(folder, **config)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_model_was_taught_is_what_it_scores(tmp_path, name):
    model, chat = loaded(tmp_path, FAMILIES[name])
    teach(model, chat, RIGHT)
    assert exact_match(model, chat) == 1.0
    assert exact_match(model, chat, WRONG[:2]) == 0.0
    assert model.generation_config.repetition_penalty == 1.3  # it decodes as before


def test_reasoning_is_neither_learned_nor_scored_unless_asked_for(tmp_path):
    family = FAMILIES["qwen-3-thinking"]
    reasoned = [
        dataclasses.replace(record, answer=f"<think>\nit is {record.id}\n</think>\n\n{record.answer}")
        for record in RIGHT
    ]
    model, chat = loaded(tmp_path, family)
    teach(model, chat, reasoned)
    assert exact_match(model, chat) == 1.0  # against the answers alone
    split = tokenize(reasoned, chat, 256)
    assert greedy(model, chat, split, 4, 64) == [record.answer for record in RIGHT]

    model, chat = loaded(tmp_path, family, thinking=True)
    teach(model, chat, reasoned)
    assert exact_match(model, chat, reasoned) == 1.0
    thoughts = greedy(model, chat, tokenize(reasoned, chat, 256), 4, 64)
    assert all(f"it is {record.id}" in thought for record, thought in zip(RIGHT, thoughts, strict=True))


def test_tool_calls_are_scored_as_the_template_writes_them(tmp_path):
    calling = [
        dataclasses.replace(
            record,
            answer="",
            calls=json.dumps([{"type": "function", "function": {"name": "paint", "arguments": {"as": record.answer}}}]),
        )
        for record in RIGHT
    ]
    model, chat = loaded(tmp_path, FAMILIES["chatml with tools"])
    teach(model, chat, calling)
    assert exact_match(model, chat, calling) == 1.0
    wrong = [dataclasses.replace(asked, calls=other.calls) for asked, other in itertools.pairwise(calling)]
    assert exact_match(model, chat, wrong) == 0.0


def test_an_answer_ends_where_the_base_has_no_more_positions(tmp_path):
    model, chat = loaded(tmp_path, FAMILIES["chatml"])
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model.config.max_position_embeddings = 40
    split = tokenize(RIGHT[:1], chat, 256)
    chat = dataclasses.replace(chat, stops=frozenset({chat.pad + 10_000}))  # nothing ends it
    greedy(model, chat, split, 1, 256)
    assert sum(seen) == 40 - 1  # the last token is not read again
