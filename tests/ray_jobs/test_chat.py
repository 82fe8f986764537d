"""A conversation with a version of the tiny base; the judge of its answers is plain transformers with peft."""

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.config import config_file
from components.config.schema import RegistryConfig, RunConfig
from components.prepare.dataset import Message, Record
from components.prepare.prepare import prepare
from components.registry.versions import Version
from components.store.store import Store
from pipelines.local.seaweedfs import Endpoint
from ray_jobs.chat import converse
from ray_jobs.talking import speaker
from ray_jobs.talking.speaker import Speaker
from tests.models.tiny_version import publish
from tests.ray_jobs.conftest import CONFIG
from tests.ray_jobs.plain import Plain, plain_of

LONGEST = 8  # tokens of an answer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model only waits for a second one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def long_config(tiny_base: Path) -> RunConfig:
    return config_file.loads(CONFIG.format(base=tiny_base), ["model.max_length=256", "method.rank=4"])


@pytest.fixture(scope="module")
def kept(s3_server: Endpoint) -> Store:
    return Store.open(RegistryConfig(bucket=s3_server.bucket, prefix=f"tests/{uuid.uuid4().hex}"))


@pytest.fixture(scope="module")
def version(long_config: RunConfig, kept: Store, tmp_path_factory: pytest.TempPathFactory) -> Version:
    return publish(long_config, kept, tmp_path_factory.mktemp("version"))


@pytest.fixture(scope="module")
def speakers(long_config: RunConfig, kept: Store, version: Version) -> list[Speaker]:
    """In float32, as in bfloat16 two tokens may be as likely, and another kernel, or a draw, take either."""
    both = speaker.load(long_config, kept, version, "colours", with_base=True)
    both[0].model.float()
    return both


def talk(speakers: Sequence[Speaker], *prompts: str, system: str = "", **how: Any) -> list[dict[str, Any]]:
    begun = [Message("system", system)] if system else []
    return list(converse(speakers, iter(prompts), begun, **{"keeps_turns": True, "say": lambda _: None, **how}))


def test_three_turns_are_answered_as_plain_transformers_answers_the_conversation(
    speakers: list[Speaker],
    long_config: RunConfig,
    kept: Store,
    version: Version,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts: list[list[int]] = []
    greedy = speaker.greedy
    monkeypatch.setattr(
        speaker, "greedy", lambda *given, **how: prompts.append(given[2].prompt(0).tolist()) or greedy(*given, **how)
    )
    asked = ["the sky?", "and the grass?", "and coal?"]
    said = talk(speakers, *asked, system="Name the colour.")
    for number, plain in enumerate([plain_of(long_config, kept, version, tmp_path), Plain(long_config.model.base)]):
        turns = [Message("system", "Name the colour.")]
        for place, prompt in enumerate(asked):
            turns.append(Message("user", prompt))
            conversation, text = Record("", list(turns), ""), said[place]["answers"][number]["text"]
            assert prompts[2 * place + number] == plain.tokens(conversation)[0].tolist()
            expected, _, is_whole = plain.answer(conversation, LONGEST)
            assert text == expected if is_whole else text.startswith(expected.rstrip())
            turns.append(Message("assistant", text))
    assert [each["model"] for each in said[0]["answers"]] == ["colours", "base"]
    assert said[0]["answers"][0]["text"] != said[0]["answers"][1]["text"]


def test_a_reset_and_prompts_that_stand_alone_begin_anew(speakers: list[Speaker]) -> None:
    first, again = talk(speakers, "the sky?", "/reset", "the sky?")
    assert first == again
    alone = talk(speakers, "the sky?", "and the grass?", "/help", keeps_turns=False)
    assert alone[1]["answers"] == talk(speakers, "and the grass?")[0]["answers"]
    assert alone[1]["answers"] != talk(speakers, "the sky?", "and the grass?")[1]["answers"]


def test_answers_are_as_long_as_asked_and_drawn_more_freely_the_warmer(speakers: list[Speaker]) -> None:
    (short,) = talk(speakers[:1], "the sky?", max_tokens=2)
    (greedy,) = talk(speakers[:1], "the sky?")
    assert len(short["answers"][0]["text"]) <= 2 < len(greedy["answers"][0]["text"])
    assert talk(speakers[:1], "the sky?", temperature=1e-4) == [greedy]
    warm = [talk(speakers[:1], "the sky?", temperature=5.0)[0] for _ in range(3)]
    assert any(each != greedy for each in warm)


def test_an_interrupt_ends_an_answer_and_the_next_speaker_goes_on() -> None:
    def stopping(turns: Sequence[Message], *, on_text: Any, **_: Any) -> None:
        on_text("half of")
        raise KeyboardInterrupt

    heard: list[list[Message]] = []

    def whole(turns: Sequence[Message], *, on_text: Any, **_: Any) -> None:
        heard.append(list(turns))
        on_text("yes")

    both: Any = [SimpleNamespace(name="a", answer=stopping), SimpleNamespace(name="b", answer=whole)]
    said: list[str] = []
    turns = talk(both, "one", "two", say=said.append)
    assert [each["stopped"] for each in turns[0]["answers"]] == [True, False]
    assert "half of [stopped]\n" in "".join(said)
    assert [turn.content for turn in heard[1]] == ["one", "yes", "two"]


def test_a_conversation_beyond_the_trained_length_loses_its_beginning_and_says_so(
    speakers: list[Speaker], caplog: pytest.LogCaptureFixture
) -> None:
    (turn,) = talk(speakers[:1], "the sky? " * 100)
    assert turn["answers"][0]["text"]
    assert "the conversation is longer than 256 tokens" in caplog.text


@pytest.mark.parametrize("in_turns", [True, False])
def test_prompts_follow_one_another_where_the_data_are_conversations(
    in_turns: bool, long_config: RunConfig, store: Store, tmp_path: Path
) -> None:
    def conversation(number: int) -> dict[str, Any]:
        turns = [("system", "Be brief."), ("user", f"thing {number}"), ("assistant", f"colour {number}")]
        turns += [("user", "and again"), ("assistant", f"colour {number}")] if in_turns else []
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(conversation(number)) + "\n" for number in range(40)))
    data = long_config.data.model_copy(update={"source": str(source), "eval_share": 0.2})
    config = long_config.model_copy(update={"data": data})
    version = publish(config, store, tmp_path, data_uri=prepare(config, store).uri)
    assert speaker.as_trained(config, store, version) == speaker.AsTrained("Be brief.", in_turns)
