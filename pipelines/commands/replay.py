"""`fineloop replay`."""

import argparse
from typing import Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_home
from pipelines.commands.opened_registry import opened_registry


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "replay",
        _replay,
        does="Decide on a run again from its stored evidence, and compare.",
        more="Exit code 1 means that the verdict, or what it follows from, is not the recorded one.",
        example="fineloop replay 20261126-0200-icd10",
    )
    parser.add_argument("run", metavar="RUN", help="the run's id in the store")
    add_config(parser)
    add_home(parser)


def _replay(options: argparse.Namespace) -> Answer:
    from components.gate.gate import replay

    with opened_registry(options) as store:
        replayed = replay(store, options.run)
    recorded, found = replayed.recorded, replayed.found
    body = {
        "run_id": options.run,
        "adapter": found.adapter,
        "version": found.version,
        "same": replayed.is_same,
        "verdict": found.verdict,
        "basis_sha256": found.basis_sha256,
        "recorded": {"verdict": recorded.verdict or recorded.decision, "basis_sha256": recorded.basis_sha256},
        "reasons": list(found.reasons),
        "unsigned": replayed.unsigned,
    }
    how = (
        "again, by the same evidence"
        if replayed.is_same
        else f"today, and {recorded.verdict or recorded.decision} then"
    )
    lines = [f"{found.adapter} {found.version}: {found.verdict} {how}", *(f"  - {reason}" for reason in found.reasons)]
    lines += [f"  basis sha256 {found.basis_sha256}", *filter(None, [replayed.unsigned])]
    if not replayed.is_same and recorded.basis_sha256:
        lines += [f"  recorded     {recorded.basis_sha256}"]
    return Answer(body, "\n".join(lines), exit_code=0 if replayed.is_same else 1)
