"""`fineloop chat` as a process, on a real store and a real version of the tiny base."""

import json
import re
import signal
from pathlib import Path
from typing import IO

import pytest
import requests

from components.registry.versions import Version
from components.store.store import Store
from tests.pipelines.command_line import begun, colours, fineloop


@pytest.fixture
def version(store: Store, tmp_path: Path) -> Version:
    return colours(store, tmp_path, "lora", "[evaluate]\nmax_new_tokens = 4\n")


@pytest.mark.slow
def test_each_line_is_answered_by_adapter_and_base_and_the_answers_alone_are_on_stdout(version, tmp_path):
    done = fineloop("chat", "colours", "-c", "where.toml", cwd=tmp_path, typed="sky?\nsnow?\n")
    assert done.returncode == 0, done.stderr
    speakers = [line.partition("|")[0].strip() for line in done.stdout.splitlines() if "|" in line]
    assert speakers == ["colours", "base"] * 2
    words = [line.partition(" ")[0] for line in done.stderr.splitlines() if not line.startswith(">")]
    assert [word for word in words if word in ("starting", "loading", "ready:")] == [
        "starting", "loading", "loading", "ready:",
    ]  # fmt: skip


@pytest.mark.slow
def test_an_interrupt_ends_an_answer_and_not_the_chat(version: Version, tmp_path: Path) -> None:
    arguments = ["chat", "colours", "-c", "where.toml", "--against", "none", "--max-tokens", "400", "--json"]
    with begun(*arguments, "--set", "evaluate.max_new_tokens=4", cwd=tmp_path) as talk:
        read_until(talk.stderr, b"ready:")
        talk.stdin.write(b"sky?\n")
        talk.stdin.flush()
        read_until(talk.stderr, b"colours | ")
        talk.send_signal(signal.SIGINT)
        read_until(talk.stderr, b"[stopped]")
        talk.stdin.write(b"snow?\n")
        talk.stdin.close()
        talk.stderr.read()
        turns = json.loads(talk.stdout.read())["turns"]
    assert talk.returncode == 0
    assert [turn["prompt"] for turn in turns] == ["sky?", "snow?"]
    assert turns[0]["answers"][0]["stopped"]


@pytest.mark.slow
def test_it_is_served_over_http_until_an_interrupt(version: Version, tmp_path: Path) -> None:
    arguments = ["serve", "colours", "--port", "0", "--against", "none", "-c", "where.toml", "--json"]
    with begun(*arguments, cwd=tmp_path) as serving:
        said = read_until(serving.stderr, b"Ctrl-C ends it")
        ((url, key),) = re.findall(r"serving \S+ at (\S+)/v1, its API key (\S+)", said.decode())
        asked = {"model": f"colours@{version.version}", "messages": [{"role": "user", "content": "sky?"}]}
        bears = {"Authorization": f"Bearer {key}"}
        answered = requests.post(f"{url}/v1/chat/completions", json=asked, headers=bears, timeout=300)
        assert answered.json()["choices"][0]["message"]["role"] == "assistant", answered.text
        serving.send_signal(signal.SIGINT)
        serving.stderr.read()
        assert json.loads(serving.stdout.read()) == {"name": "colours", "version": version.version, "against": "none"}
    assert serving.returncode == 0


def read_until(stream: IO[bytes], words: bytes) -> bytes:
    read = b""
    while words not in read:
        piece = stream.read(1)
        assert piece, read.decode()
        read += piece
    return read
