"""`fineloop serve`'s server on a real version of the tiny base, asked over HTTP.

The judge of answers is the speaker that test_chat.py holds to plain transformers, and of the format OpenAI's own words.
"""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.prepare.dataset import Message
from components.shared.errors import UserError
from pipelines.local.seaweedfs import Endpoint
from ray_jobs.talking import openai_api
from ray_jobs.talking.server import Server
from tests.models.served import serving

TURNS = [{"role": "system", "content": "Name it."}, {"role": "user", "content": "the sky?"}]


@pytest.fixture(scope="module")
def server(tiny_base: Path, s3_server: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_base, s3_server.bucket, tmp_path_factory.mktemp("version")) as server:
        yield server


def ask(server: Server, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method, path, None if body is None else json.dumps(body), given)
    response = connection.getresponse()
    read = response.status, response.read().decode(), response.headers
    connection.close()
    return read


def test_both_models_are_listed_and_answer_as_in_chat(server: Server) -> None:
    status, text, _ = ask(server, "GET", "/v1/models")
    names = [each["id"] for each in json.loads(text)["data"]]
    assert (status, names) == (200, [*server.speakers])
    assert names[0].startswith("colours@v")
    assert names[1:] == ["base"]
    answers = []
    for name in names:
        status, text, _ = ask(server, "POST", "/v1/chat/completions", {"model": name, "messages": TURNS})
        body = json.loads(text)
        turns = [Message(turn["role"], turn["content"]) for turn in TURNS]
        said = server.speakers[name].answer(turns, on_text=lambda _: None)
        assert (status, body["object"], body["model"]) == (200, "chat.completion", name)
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": said.text}
        assert choice["finish_reason"] == ("stop" if said.tokens < 8 else "length")
        assert body["usage"]["completion_tokens"] == said.tokens <= 8
        assert body["usage"]["total_tokens"] == sum(list(body["usage"].values())[:2])
        answers.append(said.text)
    assert answers[0] != answers[1]


def test_a_stream_is_the_same_answer_in_events(server: Server) -> None:
    (name, *_) = server.speakers
    asked = {"model": name, "messages": TURNS, "max_tokens": 5}
    whole = json.loads(ask(server, "POST", "/v1/chat/completions", asked)[1])["choices"][0]
    status, text, headers = ask(server, "POST", "/v1/chat/completions", {**asked, "stream": True})
    assert (status, headers.get_content_type()) == (200, "text/event-stream")
    *events, last, empty = text.split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == [whole["finish_reason"]]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "none"}, 404, "there is no model 'none'"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role 'tool'"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "x"}]}, 400, "should be of the user"),
        ({"max_tokens": 0.5}, 400, "max_tokens 0.5"),
        ({"temperature": -1}, 400, "temperature -1"),
        ({"n": 2}, 400, "n is served at 1 alone"),
        ({"tools": [{}]}, 400, "tools is not served here"),
    ],
)
def test_what_is_not_served_is_refused_in_openais_words(
    change: dict[str, Any], status: int, words: str, server: Server
) -> None:
    asked = {"model": "base", "messages": TURNS, **change}
    found, text, _ = ask(server, "POST", "/v1/chat/completions", asked)
    assert found == status
    assert words in json.loads(text)["error"]["message"]


def test_what_a_model_thought_is_left_out_of_the_turns_that_follow() -> None:
    thought = {"role": "assistant", "content": "<think>blue?</think>\n\nblue"}
    turns = openai_api.request({"messages": [*TURNS, thought, TURNS[1]]}).turns
    assert [each.content for each in turns] == ["Name it.", "the sky?", "blue", "the sky?"]


def test_other_sites_can_neither_name_the_server_nor_post_to_it(server: Server) -> None:
    assert ask(server, "GET", "/v1/models", Host=f"evil.example:{server.server_port}")[0] == 403
    asked = {"model": "base", "messages": TURNS}
    assert ask(server, "POST", "/v1/chat/completions", asked, Content_Type="text/plain")[0] == 415
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(UserError, match="cannot be had on 127"):
        Server(server.server_port, {}, {})


def test_the_page_runs_its_own_script_alone(server: Server) -> None:
    status, page, headers = ask(server, "GET", "/")
    assert status == 200
    assert "no production server" in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.partition("style-src")[0]
    about = json.loads(ask(server, "GET", "/about")[1])
    assert about == {"models": [*server.speakers], "system": "", "keeps_turns": False}
    assert ask(server, "GET", "/none")[0] == 404
