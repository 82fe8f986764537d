"""`fineloop reproduce`."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipelines.commands.adapters import REFERENCE
from pipelines.commands.arguments import Answer, add_command, add_config, add_home, load_config
from pipelines.commands.opened_registry import opened_registry

if TYPE_CHECKING:
    from pipelines.local.reproduce import Reproduced


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "reproduce",
        _reproduce,
        does="Train a version again from its lineage, and check whether the result is the same.",
        more="It takes the recorded config, rate and dataset, trains on this machine and publishes the result "
        "without an alias. The same version id means the same bytes. If they differ, the metrics are compared with "
        "the gate's bounds. Exit code 1 means that the metrics differ too.",
        example="fineloop reproduce icd10-chapters@production",
    )
    parser.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)
    add_config(parser)
    add_home(parser)


def _reproduce(options: argparse.Namespace) -> Answer:
    from components.registry.versions import resolve
    from pipelines.local.reproduce import compared, recipe
    from pipelines.local.run import Place, run

    config = load_config(options)
    with opened_registry(options) as store:
        version = resolve(store, options.reference)
        note = f"reproduces {version.name}@{version.version}"
        made_from = recipe(store, version, config, options.overrides, note=note)
    place = Place(options.home, sys.stderr, verbose=options.verbose)
    outcome = run(made_from.config, place, what="train", dataset_uri=made_from.dataset_uri)
    assert outcome.version is not None
    with opened_registry(options) as store:
        found = compared(store, version, outcome.version, made_from)
    body = {
        "name": version.name,
        "version": version.version,
        "run_id": outcome.run_id,
        "reproduced_as": found.found,
        "same": found.is_same,
        "agrees": found.agrees,
        "differs": dict(found.differs),
        "compared": None if found.compared is None else asdict(found.compared),
    }
    return Answer(body, "\n".join(_lines(version.name, found)), exit_code=0 if found.agrees else 1)


def _lines(name: str, found: "Reproduced") -> Iterator[str]:
    from components.report.side_by_side_page import gain_text
    from components.shared.metrics import metric_of

    if found.compared is None:
        yield f"{name} {found.version}: reproduced, byte by byte"
        return
    how = "other bytes, and the same metrics within their bounds" if found.agrees else "other bytes and other metrics"
    yield f"{name} {found.version}: {how}, as {found.found}"
    for key, gain in found.compared.gains.items():
        yield f"  {metric_of(key).label}: {gain_text(key, gain, found.compared.confidence)}"
    for key, (then, now) in found.differs.items():
        yield f"  {key} was {then} and is {now}"
