"""`fineloop chat`."""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.adapters import REFERENCE
from pipelines.commands.arguments import Answer, add_command, opened_registry

if TYPE_CHECKING:
    from components.registry.versions import Version
    from components.store.store import Store

# How often an idle OpenMP thread looks for work before it sleeps. By default it is some milliseconds, in which it keeps
# a processor from the thread that it waits for wherever others compute too; a token is several hundred such waits.
PATIENT_THREADS = {"GOMP_SPINCOUNT": "5000"}
AGAINST = "what answers beside it: its base (default), the version in production, another version or alias, nothing"


def add_chat(commands: Any) -> None:
    chat = add_command(
        commands,
        "chat",
        _chat,
        does="Talk to an adapter, and compare it with its base or another version.",
        more="It reads messages from the terminal, one per line, and runs the adapter on the base that it was "
        "trained on, with the same chat template. The adapter answers first. /reset begins a new conversation; "
        "Ctrl-C ends an answer, not the chat.",
        example="echo Mpox | fineloop chat icd10-chapters --against none",
        opens_registry=True,
    )
    chat.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)
    chat.add_argument(
        "--against",
        default="base",
        metavar="base|champion|VERSION|none",
        help=AGAINST,
    )
    chat.add_argument(
        "--system",
        metavar="TEXT",
        help="a system message before each conversation; without it, the training data's, if all had the same",
    )
    chat.add_argument(
        "--turns",
        choices=("keep", "alone"),
        help="whether a prompt follows those before it (default: as in the training data)",
    )
    chat.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: evaluate.max_new_tokens of its run, or else 256)",
    )
    chat.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="how freely words are drawn; 0 (default) always takes the likeliest, as evaluation does",
    )


def _chat(options: argparse.Namespace) -> Answer:
    from components.registry.versions import resolve
    from pipelines.local.guard import SIGNALLED
    from pipelines.local.job import Job, talk

    _require_sound(options)
    with opened_registry(options) as store, tempfile.TemporaryDirectory() as folder:
        version = resolve(store, options.reference)
        beside = against(store, version, options.against)
        transcript = Path(folder, "turns.jsonl")
        transcript.touch()
        arguments = ["--version", f"{version.name}@{version.version}", "--against", beside]
        arguments += ["--transcript", str(transcript), "--temperature", str(options.temperature)]
        for flag, given in (("--system", options.system), ("--turns", options.turns)):
            arguments += [] if given is None else [flag, given]
        arguments += [] if options.max_tokens is None else ["--max-tokens", str(options.max_tokens)]
        config = str(options.config.absolute())
        job = Job("ray_jobs.chat", config, arguments, options.overrides, PATIENT_THREADS)
        exit_code = talk(job, stdout=sys.stderr.fileno() if options.json else None)
        if exit_code == SIGNALLED + signal.SIGINT:
            raise KeyboardInterrupt
        turns = [json.loads(line) for line in transcript.read_text(encoding="utf-8").splitlines()]
    body = {"name": version.name, "version": version.version, "against": beside, "turns": turns}
    return Answer(body, exit_code=exit_code)


def _require_sound(options: argparse.Namespace) -> None:
    if options.max_tokens is not None and options.max_tokens < 1:
        options.parser.error(f"--max-tokens {options.max_tokens}: expected at least 1")
    if not 0 <= options.temperature < float("inf"):
        options.parser.error(f"--temperature {options.temperature}: expected 0 or more")


def against(store: "Store", version: "Version", wanted: str) -> str:
    """What the job is given: base, none, or NAME@VERSION."""
    from components.registry.aliases import PRODUCTION
    from components.registry.versions import resolve
    from components.shared.errors import UserError

    if wanted in ("base", "none"):
        return wanted
    at = PRODUCTION if wanted == "champion" else wanted
    other = resolve(store, at if "@" in at else f"{version.name}@{at}")
    if (other.name, other.version) == (version.name, version.version):
        raise UserError(
            f"--against {wanted} is {version.name} {version.version} itself: name another version, base or none"
        )
    return f"{other.name}@{other.version}"


# `fineloop serve`.

PORT = 8008


def add_serve(commands: Any) -> None:
    serve = add_command(
        commands,
        "serve",
        _serve,
        does="Serve an adapter in OpenAI's format on this machine, with a page that compares it with its base.",
        more="It answers chat/completions, streamed or whole, and /v1/models, one request at a time, on loopback "
        "only, to who sends the token that it prints as API key: it is not a production server, for which "
        "serve-manifest writes the commands. Answers are greedy unless a request says otherwise. Ctrl-C ends it.",
        example="fineloop serve icd10-chapters --port 8008",
        opens_registry=True,
    )
    serve.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)
    serve.add_argument("--against", default="base", metavar="base|champion|VERSION|none", help=AGAINST)
    serve.add_argument("--port", type=int, default=PORT, metavar="N", help=f"default: {PORT}; 0 takes any that is free")


def _serve(options: argparse.Namespace) -> Answer:
    from components.registry.versions import resolve
    from pipelines.local.job import Job, talk

    with opened_registry(options) as store:
        version = resolve(store, options.reference)
        beside = against(store, version, options.against)
        arguments = ["--version", f"{version.name}@{version.version}", "--against", beside]
        config = str(options.config.absolute())
        job = Job(
            "ray_jobs.serve", config, [*arguments, "--port", str(options.port)], options.overrides, PATIENT_THREADS
        )
        exit_code = talk(job, stdout=sys.stderr.fileno())
    return Answer({"name": version.name, "version": version.version, "against": beside}, exit_code=exit_code)
