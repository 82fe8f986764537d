"""`fineloop chat` and `fineloop serve`."""

import argparse
import json
import math
import signal
import sys
import tempfile
from pathlib import Path

from pipelines.commands.arguments import REFERENCE, REGISTRY, Answer, command, opened_version, option
from pipelines.local.guard import SIGNALLED
from pipelines.local.job import Job, talk

AGAINST = option(
    "--against", "what answers beside it: its base (default), or nothing", choices=("base", "none"), default="base"
)


@command(
    "chat",
    *(*REGISTRY, REFERENCE, AGAINST),
    option("--system TEXT", "before each conversation (default: the training data's, if they share one)", default=None),
    option("--turns", "whether prompts follow one another (default: as in training)", choices=("keep", "alone")),
    option("--max-tokens N", "longest answer (default: evaluate.max_new_tokens of its run, or else 256)", type=int),
    option("--temperature T", "of sampling; 0 (default) is greedy, as evaluation decodes", type=float, default=0.0),
    example="echo Mpox | fineloop chat icd10-chapters --against none",
)
def chat(options: argparse.Namespace) -> Answer:
    """Talk to an adapter, and compare it with its base.

    It reads messages from the terminal, one per line, and runs the adapter on the base that it was trained on, with the
    same chat template. The adapter answers first. /reset begins a new conversation; Ctrl-C ends an answer, not the
    chat.
    """
    if options.max_tokens is not None and options.max_tokens < 1:
        options.parser.error(f"--max-tokens {options.max_tokens}: expected at least 1")
    if not 0 <= options.temperature < math.inf:
        options.parser.error(f"--temperature {options.temperature}: expected 0 or more")
    with tempfile.TemporaryDirectory() as folder:
        transcript = Path(folder, "turns.jsonl")
        transcript.touch()
        arguments = ["--transcript", str(transcript), "--temperature", str(options.temperature)]
        for name in ("system", "turns", "max_tokens"):
            if (value := getattr(options, name)) is not None:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        answer = _talk(options, "ray_jobs.chat", arguments, stdout=sys.stderr.fileno() if options.json else None)
        if answer.exit_code == SIGNALLED + signal.SIGINT:
            raise KeyboardInterrupt
        answer.body["turns"] = [json.loads(line) for line in transcript.read_text(encoding="utf-8").splitlines()]
    return answer


@command(
    "serve",
    *(*REGISTRY, REFERENCE, AGAINST),
    option("--port N", "default: 8008; 0 takes any that is free", type=int, default=8008),
    example="fineloop serve icd10-chapters --port 8008",
)
def serve(options: argparse.Namespace) -> Answer:
    """Serve an adapter in OpenAI's format on this machine, with a page that compares it with its base.

    It answers chat/completions, streamed or whole, and /v1/models, one request at a time, on loopback only, to who
    sends the token that it prints as API key: it is not a production server, for which serve-manifest writes the
    commands. Answers are greedy unless a request says otherwise. Ctrl-C ends it.
    """
    return _talk(options, "ray_jobs.serve", ["--port", str(options.port)], stdout=sys.stderr.fileno())


def _talk(options: argparse.Namespace, module: str, arguments: list[str], *, stdout: int | None) -> Answer:
    """Run a module that talks with the version, on this terminal, until it ends."""
    with opened_version(options) as (_, version):
        arguments = ["--version", f"{version.name}@{version.version}", "--against", options.against, *arguments]
        # How often an idle OpenMP thread looks for work before it sleeps: by default for some milliseconds, in which it
        # keeps a processor from the thread that it waits for; a token is several hundred such waits.
        patient_threads = {"GOMP_SPINCOUNT": "5000"}
        job = Job(module, str(options.config.absolute()), arguments, options.overrides, patient_threads)
        exit_code = talk(job, stdout=stdout)
    return Answer({"name": version.name, "version": version.version, "against": options.against}, exit_code=exit_code)
