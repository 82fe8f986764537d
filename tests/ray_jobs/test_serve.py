"""`fineloop serve`'s server over HTTP: on a real version, judged as in test_chat.py, and on scripted speakers."""

import contextlib
import http.client
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp.web_protocol import RequestHandler

from components.prepare.dataset import Message
from components.shared.errors import UserError
from pipelines.local.seaweedfs import Endpoint
from ray_jobs.talking import server as serve
from ray_jobs.talking.server import Server, parsed_request
from ray_jobs.talking.speaker import Reply
from tests.models.served import listening, serving
from tests.waiting import PATIENCE_S, wait_until

TURNS = [{"role": "system", "content": "Name it."}, {"role": "user", "content": "the sky?"}]


@pytest.fixture(scope="module")
def server(tiny_base: Path, s3_server: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_base, s3_server.bucket, tmp_path_factory.mktemp("version")) as server:
        yield server


@dataclass
class Scripted:
    """A speaker that says `words`, and waits for `goes_on` before each; it notes what it was asked."""

    words: list[str]
    goes_on: threading.Event = field(default_factory=threading.Event)
    heard: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def answer(self, turns: Sequence[Message], *, on_text: Callable[[str], None], **_: Any) -> Reply:
        self.heard.append(turns[-1].content)
        for word in self.words:
            assert self.goes_on.wait(PATIENCE_S)
            on_text(word)
            self.said.append(word)
        return Reply("".join(self.words), 1, 1, ended=True)


@contextlib.contextmanager
def scripted(speaker: Scripted) -> Iterator[Server]:
    named: Any = {"model": speaker}
    with listening(Server(0, named, {})) as server:
        yield server


def port(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


def ask(server: Server, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, Any]:
    """What it answers to one who bears its token; `body` is sent as JSON unless it is bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port(server), timeout=PATIENCE_S)
    given = {
        **{"Content-Type": "application/json", "Authorization": f"Bearer {server.token}"},
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, sent, given)
    response = connection.getresponse()
    read = response.status, response.read().decode(), response.headers
    connection.close()
    return read


def begin(server: Server, prompt: str, *, stream: bool) -> socket.socket:
    """A client that has sent its request, and reads nothing."""
    body = json.dumps({"model": "model", "messages": [{"role": "user", "content": prompt}], "stream": stream})
    client = socket.create_connection(("127.0.0.1", port(server)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port(server)}\r\n"
    head += f"Authorization: Bearer {server.token}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    client.sendall(f"{head}\r\n\r\n{body}".encode())
    return client


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The ports of clients whose connection the server has seen end, which it learns later than the kernel does."""
    ports: set[int] = set()
    connection_lost = RequestHandler.connection_lost

    def noted(self: RequestHandler, exc: BaseException | None) -> None:
        port: int = self.transport.get_extra_info("peername")[1]
        connection_lost(self, exc)
        ports.add(port)

    monkeypatch.setattr(RequestHandler, "connection_lost", noted)
    return ports


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
        (b"[" * 100_000, 400, ""),
        (b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, ""),
        (b"\xff\xfe", 400, ""),
        (b"[]", 400, ""),
        (b" " * (2**20 + 1), 413, ""),
    ],
)
def test_what_is_not_served_or_cannot_be_read_is_one_error_in_openais_words(
    change: dict[str, Any] | bytes, status: int, words: str, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    body = change if isinstance(change, bytes) else {"model": "base", "messages": TURNS, **change}
    found, text, headers = ask(server, "POST", "/v1/chat/completions", body)
    assert (found, headers.get_content_type()) == (status, "application/json")
    assert headers["X-Content-Type-Options"] == "nosniff"
    message = json.loads(text)["error"]["message"]
    assert message
    assert words in message
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_what_a_model_thought_is_left_out_and_a_developer_is_the_system() -> None:
    thought = {"role": "assistant", "content": "<think>blue?</think>\n\nblue"}
    turns = parsed_request({"messages": [*TURNS, thought, TURNS[1]]}).turns
    assert [each.content for each in turns] == ["Name it.", "the sky?", "blue", "the sky?"]
    asked = {"messages": [{**TURNS[0], "role": "developer"}, *TURNS[1:]]}
    assert parsed_request(asked).turns == parsed_request({"messages": TURNS}).turns


def test_other_sites_can_neither_name_the_server_nor_post_to_it(server: Server) -> None:
    for host in (f"evil.example:{port(server)}", "localhost", f"127.0.0.1.evil.example:{port(server)}", ""):
        assert ask(server, "GET", "/v1/models", Host=host)[0] == 403
    assert ask(server, "GET", f"http://evil.example:{port(server)}/v1/models")[0] == 403
    assert ask(server, "GET", "/v1/models", Host=f"localhost:{port(server)}")[0] == 200
    asked = {"model": "base", "messages": TURNS}
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert ask(server, "POST", "/v1/chat/completions", asked, Content_Type=kind)[0] == 415
    status, _, headers = ask(server, "OPTIONS", "/v1/chat/completions", Origin="http://evil.example")
    assert status == 405
    assert not [name for name in headers if name.startswith("Access-Control")]
    assert urlsplit(server.url).hostname == "127.0.0.1"
    with pytest.raises(UserError, match="cannot be had on 127"):
        Server(port(server), {}, {})


def test_another_user_of_the_machine_who_lacks_the_token_learns_that_it_is_up_alone(server: Server) -> None:
    asked = {"model": "base", "messages": TURNS}
    for given in ("", "Bearer ", f"Bearer {server.token}x", "Bearer \xe9", server.token[:-1]):
        for verb, path, body in (
            *(("GET", path, None) for path in ("/", "/about", "/v1/models", "/none")),
            ("POST", "/v1/chat/completions", asked),
        ):
            status, text, _ = ask(server, verb, path, body, Authorization=given)
            assert (status, "token" in json.loads(text)["error"]["message"]) == (401, True)
    assert ask(server, "GET", "/health", Authorization="")[:2] == (200, '{"status": "ok"}')
    assert ask(server, "GET", f"/?token={server.token}", Authorization="")[0] == 200


def test_a_client_that_does_not_read_stops_no_other_and_is_dropped(
    monkeypatch: pytest.MonkeyPatch, lost: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve, "PATIENCE_S", 0.5)
    speaker = Scripted(["x" * 1_000_000] * 30)
    speaker.goes_on.set()
    with scripted(speaker) as server, contextlib.closing(begin(server, "first", stream=True)) as deaf:
        asked = {"model": "model", "messages": [{"role": "user", "content": "second"}]}
        assert ask(server, "POST", "/v1/chat/completions", asked)[0] == 200
        wait_until(lambda: deaf.getsockname()[1] in lost)
        received = 0
        with contextlib.suppress(ConnectionError):
            while piece := deaf.recv(1 << 20):
                received += len(piece)
    assert speaker.heard == ["first", "second"]
    assert received < 30_000_000
    assert caplog.records == []


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_is_answered_who_has_hung_up(stream: bool, lost: set[int], caplog: pytest.LogCaptureFixture) -> None:
    speaker = Scripted(["a", "b"])
    with scripted(speaker) as server:
        first = begin(server, "first", stream=stream)
        wait_until(lambda: speaker.heard == ["first"])
        others = [begin(server, f"other {number}", stream=stream) for number in range(5)]
        for _ in range(5):  # so that it has read the others
            ask(server, "GET", "/health")
        ports = {client.getsockname()[1] for client in (first, *others)}
        for client in (first, *others):
            client.close()
        wait_until(lambda: ports <= lost)
        speaker.goes_on.set()
        asked = {"model": "model", "messages": [{"role": "user", "content": "last"}]}
        assert ask(server, "POST", "/v1/chat/completions", asked)[0] == 200
    assert speaker.heard == ["first", "last"]
    assert speaker.said == ["a", "b"], "the first answer ended before its first word"
    assert caplog.records == []


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
