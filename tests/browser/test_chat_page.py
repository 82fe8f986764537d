"""The page of `fineloop serve`, used as a person uses it. The judge of an answer is the model, asked without it."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from components.prepare.dataset import Message
from components.shared.errors import DataError
from pipelines.local.seaweedfs import Endpoint
from ray_jobs.talking.server import Server
from ray_jobs.talking.speaker import Reply
from tests.browser.looks import check
from tests.models.served import listening, serving
from tests.models.tiny import build_base

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


@dataclass
class Scripted:
    """A speaker whose answers are known beforehand; `waits` holds it after its first word."""

    answers: list[str]
    fails: bool = False
    waits: threading.Event | None = None
    heard: list[list[Message]] = field(default_factory=list)

    def answer(self, turns: Sequence[Message], *, on_text: Any, **_: Any) -> Reply:
        self.heard.append([*turns])
        text = self.answers.pop(0)
        for place, word in enumerate(text.split(" ")):
            on_text(word if place == 0 else f" {word}")
            if self.waits is not None:
                self.waits.wait(120)
        if self.fails:
            raise DataError("the answer went wrong")
        return Reply(text, 1, 1, ended=True)


def send(page: "Page", text: str) -> None:
    page.get_by_label("Message (Enter sends").fill(text)
    page.get_by_role("button", name="Send").click()


def answered(page: "Page") -> None:
    page.locator("#send:enabled").wait_for()


def said(page: "Page", column: int) -> list[str]:
    return page.locator("section").nth(column).locator(".assistant").all_text_contents()


def test_two_columns_answer_a_conversation_of_two_turns_as_the_models_do(
    page: "Page", s3_server: Endpoint, tmp_path: Path
) -> None:
    with serving(build_base(tmp_path / "base"), s3_server.bucket, tmp_path) as server:
        page.goto(f"{server.url}/?token={server.token}")
        page.get_by_label("keep the turns before").check()
        for prompt in ("the sky?", "and grass?"):
            send(page, prompt)
            answered(page)
        for column, (name, speaker) in enumerate(server.speakers.items()):
            assert page.locator("section h2").nth(column).inner_text() == name
            turns, answers = list[Message](), []
            for prompt in ("the sky?", "and grass?"):
                turns.append(Message("user", prompt))
                answers.append(speaker.answer(turns, on_text=lambda _: None).text)
                turns.append(Message("assistant", answers[-1]))
            assert said(page, column) == answers
        assert said(page, 0) != said(page, 1)


def scripted(*speakers: Scripted) -> Server:
    named: Any = {f"model-{place}": speaker for place, speaker in enumerate(speakers)}
    return Server(0, named, {"models": [*named], "system": "", "keeps_turns": True})


def test_stop_ends_an_answer_and_its_word_is_no_part_of_the_conversation(page: "Page") -> None:
    slow = Scripted(["one two three", "four"], waits=threading.Event())
    with listening(scripted(slow, Scripted(["a", "b"]))) as server:
        page.goto(f"{server.url}/?token={server.token}")
        send(page, "first")
        page.get_by_text("one", exact=True).wait_for()
        page.get_by_role("button", name="Stop this answer").click()
        page.get_by_text("stopped").wait_for()
        assert slow.waits
        slow.waits.set()
        answered(page)
        send(page, "second")
        answered(page)
        assert said(page, 0) == ["one", "four"]
        assert said(page, 1) == ["a", "b"]
    turns = [(each.role, each.content) for each in slow.heard[-1]]
    assert turns == [("user", "first"), ("assistant", "one"), ("user", "second")]


@pytest.mark.parametrize(("text", "kept"), [("some words", ["user", "assistant", "user"]), ("", ["user"])])
def test_an_error_is_shown_and_its_words_do_not_enter_the_next_prompt(text: str, kept: list[str], page: "Page") -> None:
    broken = Scripted([text, text], fails=True)
    with listening(scripted(broken)) as server:
        page.goto(f"{server.url}/?token={server.token}")
        for prompt in ("first", "second"):
            send(page, prompt)
            answered(page)
        assert page.locator(".wrong:visible").all_inner_texts() == ["the answer went wrong"] * 2
    assert [each.role for each in broken.heard[-1]] == kept
    assert not any("wrong" in each.content for each in broken.heard[-1])


def test_a_new_conversation_begins_empty_even_while_an_answer_comes(page: "Page") -> None:
    slow = Scripted(["one two three", "four"], waits=threading.Event())
    with listening(scripted(slow)) as server:
        page.goto(f"{server.url}/?token={server.token}")
        send(page, "first")
        page.get_by_text("one", exact=True).wait_for()
        page.get_by_role("button", name="New conversation").click()
        assert slow.waits
        slow.waits.set()
        answered(page)
        assert page.locator(".turn").count() == 0
        send(page, "second")
        answered(page)
    assert [(each.role, each.content) for each in slow.heard[-1]] == [("user", "second")]


def test_the_page_reads_well_on_every_screen(browser: "Browser") -> None:
    ramble = (
        "Mpox is a viral disease that is caused by the monkeypox virus. The ICD-10 chapter is a list of codes that "
    )
    shorter = "Kwashiorkor is a form of malnutrition. It is caused by a lack of protein in the diet."
    speakers: Any = {"icd10-chapters@v8a02f6d71be93c4": None, "base": None}

    def begin(page: "Page", server: Server) -> None:
        speakers.update(
            zip(speakers, (Scripted(["Infections", "Endocrine"]), Scripted([ramble, shorter])), strict=True)
        )
        page.goto(f"{server.url}/?token={server.token}")
        for prompt in ("ICD-10 chapter: Mpox", "ICD-10 chapter: Kwashiorkor"):
            send(page, prompt)
            answered(page)

    about = {"models": [*speakers], "system": "", "keeps_turns": True}
    with listening(Server(0, speakers, about)) as server:
        check(browser, lambda page: begin(page, server))
