"""`fineloop push`."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_home
from pipelines.commands.opened_registry import opened_registry

REFERENCE = "NAME[@ALIAS|@VERSION]"


def add(commands: Any) -> None:
    """Add the command."""
    push = add_command(
        commands,
        "push",
        _push,
        does="Push a version, or an exported folder of it, to a model hub.",
        more="A missing repository is created, private unless --public is given. The commit is tagged with the "
        "version. The token is read from HF_TOKEN only. A version is pushed with its lineage.json and "
        "manifest.json, which name the data, the store and the user who started the run.",
        example="fineloop push icd10-chapters@production acme/icd10-chapters",
    )
    push.add_argument(
        "reference", metavar=REFERENCE, help="NAME, NAME@ALIAS or NAME@VERSION; first digits of a version suffice"
    )
    push.add_argument("repository", metavar="ORG/NAME", help="repository of models on the hub")
    push.add_argument(
        "--from",
        dest="folder",
        type=Path,
        metavar="DIR",
        help="push this folder, written by `adapters export`, instead",
    )
    push.add_argument("--public", action="store_true", help="make a repository that anyone may read")
    add_config(push)
    add_home(push)


def _push(options: argparse.Namespace) -> Answer:
    from components.handover import hub
    from components.registry.versions import pull_version, resolve

    with opened_registry(options) as store, tempfile.TemporaryDirectory(prefix="fineloop-push-") as scratch:
        version = resolve(store, options.reference)
        if options.folder:
            folder, tag = _exported(options.folder, version.version)
        else:
            folder, tag = Path(scratch) / "version", version.version
            pull_version(store, version, folder)
        url = hub.push(
            folder,
            options.repository,
            message=f"{version.name} {version.version}",
            tag=tag,
            is_public=options.public,
            environment=os.environ,
        )
    body = {"name": version.name, "version": version.version, "repository": options.repository, "tag": tag, "url": url}
    return Answer(body, f"{version.name} {version.version} is at {url}")


def _exported(folder: Path, version: str) -> tuple[Path, str]:
    """The folder and its commit's tag, where an export of this version has written it."""
    import json

    from components.shared.errors import UserError

    record = folder / "export.json"
    if not record.is_file():
        raise UserError(f"{folder} has no export.json: name a folder that `fineloop adapters export` has written")
    found = json.loads(record.read_text(encoding="utf-8"))
    if found["version"] != version:
        raise UserError(f"{folder} was made of {found['version']}, not of {version}")
    return folder, f"{version}-{found['form']}"
