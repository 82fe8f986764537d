"""Bases that Fineloop makes and keeps in the store: each is made once, and only downloaded from then on.

bases/<id>/chosen.json   which folder beside it everyone uses: that of the first run to finish one
bases/<id>/<content>/    a transformers model: `from_pretrained` loads it as it is

The id is a hash of all that the base depends on. Other hardware may give other numbers, so each content has a folder:
files of two builds never mix. Release 0.1.0 wrote the files to bases/<id>/ itself, which is still read.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared.errors import IntegrityError
from components.store import folders
from components.store.store import JSON, Store, decode_json, encode_json
from ray_jobs.base.base_model import DIGESTS, HASHED_AT_ONCE, Base
from ray_jobs.base.digests import remembered
from ray_jobs.base.local_cache import cache_dir, once

logger = logging.getLogger(__name__)

CHOSEN = "chosen.json"
FORMAT = 1  # of chosen.json
FIELDS = {"folder": "[0-9a-f]{16}", "manifest_sha256": "[0-9a-f]{64}"}
"""Fields of chosen.json with their patterns: both become parts of paths."""
COPIED = {".json", ".jinja", ".txt", ".model", ".py"}
"""Suffixes of the files that are copied from the original base: tokenizer, chat template, and code if it has any."""
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class MadeBase:
    """A base in the store that everyone uses."""

    key: str
    manifest_sha256: str


def key_of(made_from: Mapping[str, Any]) -> str:
    """Key in the store of the base with these inputs, which are JSON values."""
    return f"bases/{hashlib.sha256(encode_json(made_from)).hexdigest()[:16]}"


def find(store: Store, key: str) -> MadeBase | None:
    """Look the base up; None where it was never made."""
    found = store.read(f"{key}/{CHOSEN}")
    if found is None:
        manifest = folders.find_manifest(store, key)
        return MadeBase(key, manifest.sha256) if manifest else None
    uri = store.uri(f"{key}/{CHOSEN}")
    chosen = decode_json(found[0], uri)
    known = isinstance(chosen, dict) and chosen.get("format") == FORMAT
    if not known or not all(re.fullmatch(pattern, str(chosen.get(field))) for field, pattern in FIELDS.items()):
        raise IntegrityError(f"{uri} names no base of format {FORMAT}")
    return MadeBase(f"{key}/{chosen['folder']}", str(chosen["manifest_sha256"]))


def pull(store: Store, made: MadeBase, kind: str) -> Path:
    """Download the base to this machine's cache, once and with every byte verified; returns its folder.

    Raises:
        IntegrityError: it is damaged in the store, or the cached copy has changed.
    """
    path = cache_dir() / f"{kind}-{made.manifest_sha256[:16]}"
    once(path, lambda target: folders.pull(store, made.key, target, manifest_sha256=made.manifest_sha256))
    if not _is_whole(path, made):
        raise IntegrityError(f"{path} is not {store.uri(made.key)} any more: delete it")
    return path


def _is_whole(path: Path, made: MadeBase) -> bool:
    """Whether a cached folder is as it was downloaded. Its files are hashed once per machine, not in every process."""
    body, known = (path / folders.MANIFEST).read_bytes(), cache_dir().with_name("digests")
    if hashlib.sha256(body).hexdigest() != made.manifest_sha256:
        return False
    listed = folders.parse_manifest(body, str(path)).files

    def is_same(name: str) -> bool:
        return (path / name).is_file() and remembered(path / name, known) == listed[name]["sha256"]

    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return all(pool.map(is_same, listed))


def require_same_code(folder: Path, original: Base) -> None:
    """Require that a model's folder comes with no code but the original's, to which alone a config consents.

    transformers runs Python files of a folder, and of repositories that an `auto_map` in its JSON files names.

    Raises:
        IntegrityError: it has other code.
    """
    theirs = _code(original.path)
    if other := sorted(name for name, code in _code(folder).items() if theirs.get(name) != code):
        raise IntegrityError(
            f"{folder} comes with code that is not that of {original.reference}, in {', '.join(other)}: "
            "model.trust_remote_code does not allow it"
        )


def _code(folder: Path) -> dict[str, Any]:
    """Python files with their bytes, and the entries of each `auto_map`, by file and key."""
    found: dict[str, Any] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_bytes())
        named = settings.get("auto_map") if isinstance(settings, dict) else None
        found |= {f"{path.name} {key}": value for key, value in (named or {}).items()}
    return found


def publish(store: Store, key: str, folder: Path, original: Base, about: Mapping[str, Any]) -> None:
    """Publish the model in `folder`, to which the other files of the original's folder are added.

    The base that is published first is the one that everyone uses.
    """
    for path in original.path.iterdir():
        is_other = path.suffix in COPIED and path.name != DIGESTS and not path.name.endswith(INDEX)
        if is_other and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    files: dict[str, bytes | Path] = {path.name: path for path in folder.iterdir()}
    content = {name: folders.digest_of(body)["sha256"] for name, body in files.items()}
    name = hashlib.sha256(encode_json(content)).hexdigest()[:16]
    manifest = folders.publish(store, f"{key}/{name}", files, about=about)
    chosen = encode_json({"format": FORMAT, "folder": name, "manifest_sha256": manifest.sha256})
    if store.claim(f"{key}/{CHOSEN}", chosen, content_type=JSON) != chosen:
        logger.info("another run was faster, and its base at %s is the one in use", store.uri(key))
