"""`fineloop serve`."""

import argparse
import sys
from typing import Any

from pipelines.commands.adapters import REFERENCE
from pipelines.commands.arguments import Answer, add_command, add_config, add_home
from pipelines.commands.chat import AGAINST, PATIENT_THREADS, against
from pipelines.commands.opened_registry import opened_registry

PORT = 8008


def add(commands: Any) -> None:
    """Add the command."""
    serve = add_command(
        commands,
        "serve",
        _serve,
        does="Serve an adapter in OpenAI's format on this machine, with a page that compares it with its base.",
        more="It answers chat/completions, streamed or whole, and /v1/models, one request at a time, on loopback "
        "only, to who sends the token that it prints as API key: it is not a production server, for which "
        "serve-manifest writes the commands. Answers are greedy unless a request says otherwise. Ctrl-C ends it.",
        example="fineloop serve icd10-chapters --port 8008",
    )
    serve.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)
    serve.add_argument("--against", default="base", metavar="base|champion|VERSION|none", help=AGAINST)
    serve.add_argument("--port", type=int, default=PORT, metavar="N", help=f"default: {PORT}; 0 takes any that is free")
    add_config(serve)
    add_home(serve)


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
