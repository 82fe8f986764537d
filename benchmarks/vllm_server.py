"""A real vLLM as a server, from an environment of its own, and what it answers."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.prepare.dataset import Record

ON_PROCESSORS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
}
STARTS_WITHIN_S = 500


@contextlib.contextmanager
def serving(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run a `vllm serve` in `folder` until the block ends; gives its URL once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    with (folder / "vllm.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**os.environ, **ON_PROCESSORS, **(environment or {})},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(urllib.error.URLError, OSError):
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                if server.poll() is not None or time.monotonic() - began > STARTS_WITHIN_S:
                    raise SystemExit((folder / "vllm.log").read_text()[-4000:])
                time.sleep(1)
            print(f"it answers after {time.monotonic() - began:.0f} s", flush=True)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


@dataclass(frozen=True)
class Answer:
    """A greedy answer, and for each of its tokens the two likeliest with their log-probabilities."""

    text: str
    likeliest: list[list[tuple[str, float]]]

    def margin(self, other: str) -> float:
        """How much likelier, in nats, this answer's token is than the other one's, where they part; infinite if the
        other one's is not the runner-up there."""
        rest = other
        for (token, best), (runner_up, second) in self.likeliest:
            if rest.startswith(token):
                rest = rest.removeprefix(token)
            elif rest or not token.startswith("<|"):  # a token such as <|end|> is no part of the text
                is_runner_up = rest.startswith(runner_up) if rest else runner_up.startswith("<|")
                return best - second if is_runner_up else math.inf
        return math.inf


def posted(url: str, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
    """Status and text of what the server answers."""
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def asked(url: str, model: str, record: Record, max_tokens: int = 64) -> Answer:
    """The server's greedy answer to the record's prompt."""
    body = {
        "model": model,
        "messages": [{"role": turn.role, "content": turn.content} for turn in record.prompt],
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": True,
        "top_logprobs": 2,
    }
    status, text = posted(url, "/v1/chat/completions", body)
    if status != 200:
        raise SystemExit(f"{model} is not served: {status} {text}")
    (choice,) = json.loads(text)["choices"]
    likeliest = [[(t["token"], t["logprob"]) for t in place["top_logprobs"]] for place in choice["logprobs"]["content"]]
    return Answer(choice["message"]["content"].strip(), likeliest)
