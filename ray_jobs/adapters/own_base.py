"""The base of an adapter: the original, or one of its own that was computed together with the adapter's first weights.

`method.init` says which. A base of an adapter's own belongs to it and to no other. All workers make it together, once,
and it is only downloaded from then on.

bases/<id>/chosen.json                             which folder beside it everyone uses: that of the first run to finish
bases/<id>/<content>/                              a transformers model: `from_pretrained` loads it as it is
bases/<id>/<content>/<init>_init.safetensors       the first weights: LAYER.lora_A and LAYER.lora_B, as of scaling 1
bases/<id>/<content>/<init>.json                   what it was made from, and what its making measured

The id is a hash of all that the base depends on. Other hardware may give other numbers, so each content has a folder:
files of two builds never mix. `loftq` makes the one kind that there is.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.methods import OWN_BASE
from components.config.schema import MethodConfig, TrainingConfig
from components.shared.errors import IntegrityError, ObjectMissing
from components.store import folders
from components.store.store import JSON, Store, decode_json, encode_json
from ray_jobs.adapters import loftq
from ray_jobs.base import together
from ray_jobs.base.base_model import HASHED_AT_ONCE, Base
from ray_jobs.base.local_cache import DIGESTS, cache_dir, once, remembered

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

CHOSEN = "chosen.json"
FORMAT = 1  # of chosen.json
FIELDS = {"folder": "[0-9a-f]{16}", "manifest_sha256": "[0-9a-f]{64}"}
"""Fields of chosen.json with their patterns: both become parts of paths."""
COPIED = {".json", ".jinja", ".txt", ".model", ".py"}
"""Suffixes of the files that are copied from the original base: tokenizer, chat template, and code if it has any."""
INDEX = ".safetensors.index.json"


def is_needed(method: MethodConfig) -> bool:
    """Whether adapters of this method have a base of their own."""
    return method.row.init in OWN_BASE


def check(config: TrainingConfig, original: Base) -> None:
    """Check what can be checked before any worker trains. Raises ConfigError: `method.init` makes no base of the
    original."""
    if is_needed(config.method):
        loftq.find_layers(config, original)


def prepare(
    config: TrainingConfig, original: Base, store: Store, *, sha256: str = "", rank: int = 0, num_workers: int = 1
) -> Base:
    """The base to train on; `sha256` as for `find`, where the training starts from a version.

    Where the store does not have it yet, all workers make it together: each must call this in an initialised process
    group, and before anything, such as ZeRO-3, changes how models are loaded.
    """
    if not is_needed(config.method):
        return original
    key = folder_key(config.method, original)
    with together.gloo_group(num_workers) as group:
        if together.from_rank_0(rank == 0 and _chosen(store, key) is None, group):
            splits = loftq.compute(config, original, rank=rank, num_workers=num_workers, group=group)
            together.on_rank_0(lambda: _publish(config, original, store, splits), rank=rank, group=group)
    return find(config, original, store, sha256=sha256)


def find(config: TrainingConfig, original: Base, store: Store, *, sha256: str) -> Base:
    """The base that an adapter of this config was trained on, pulled into the cache with every byte verified.

    `sha256` is that of its manifest by the version's lineage. Empty accepts the base that the store has now. Raises
    IntegrityError: it is damaged, another than the lineage's, or comes with code that may run and is not the
    original's.
    """
    if not is_needed(config.method):
        return original
    key = folder_key(config.method, original)
    chosen = _chosen(store, key)
    if chosen is None:
        raise ObjectMissing(f"{store.uri(key)} does not exist: it has no {CHOSEN}")
    folder, today = chosen
    if sha256 not in ("", today):
        raise IntegrityError(
            f"the adapter was trained on the base in {store.uri(key)} whose manifest has sha256 {sha256}, and today "
            f"that is {today}: put the one that it was trained on back there, or train it again"
        )
    init = config.method.row.init
    path = cache_dir() / f"{init}-{today[:16]}"
    once(path, lambda target: folders.pull(store, folder, target, manifest_sha256=today))
    if not _is_whole(path, today):
        raise IntegrityError(f"{path} is not {store.uri(folder)} any more: delete it")
    if config.model.trust_remote_code:
        _require_same_code(path, original)
    return Base(store.uri(folder), path, {"kind": init, "manifest_sha256": today})


def _chosen(store: Store, key: str) -> tuple[str, str] | None:
    """Folder, and sha256 of its manifest, of the base that everyone uses; None where it was never made."""
    pointer = store.read(f"{key}/{CHOSEN}")
    if pointer is None:
        return None
    uri = store.uri(f"{key}/{CHOSEN}")
    chosen = decode_json(pointer[0], uri)
    is_ours = isinstance(chosen, dict) and chosen.get("format") == FORMAT
    if not is_ours or not all(re.fullmatch(pattern, str(chosen.get(field))) for field, pattern in FIELDS.items()):
        raise IntegrityError(f"{uri} names no base of format {FORMAT}")
    return f"{key}/{chosen['folder']}", str(chosen["manifest_sha256"])


def _is_whole(path: Path, manifest_sha256: str) -> bool:
    """Whether a cached folder is as it was downloaded. Its files are hashed once per machine, not in every process."""
    body = (path / folders.MANIFEST).read_bytes()
    if hashlib.sha256(body).hexdigest() != manifest_sha256:
        return False
    listed = folders.parse_manifest(body, str(path)).files

    def is_same(name: str) -> bool:
        return (path / name).is_file() and remembered(path / name) == listed[name]["sha256"]

    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return all(pool.map(is_same, listed))


def _require_same_code(folder: Path, original: Base) -> None:
    """Raise IntegrityError if a model's folder comes with code but the original's, to which alone a config consents:
    transformers runs its Python files, and those of repositories that an `auto_map` in its JSON files names."""
    theirs = _code(original.path)
    if other := sorted(name for name, code in _code(folder).items() if theirs.get(name) != code):
        raise IntegrityError(
            f"{folder} comes with code that is not that of {original.reference}, in {', '.join(other)}: "
            "model.trust_remote_code does not allow it"
        )


def _code(folder: Path) -> dict[str, Any]:
    """Python files with their bytes, and the entries of each `auto_map`, by file and key."""
    code: dict[str, Any] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_bytes())
        named = settings.get("auto_map") if isinstance(settings, dict) else None
        code |= {f"{path.name} {key}": value for key, value in (named or {}).items()}
    return code


def begin(config: TrainingConfig, adapted: "PeftModel", base: Base) -> None:
    """Set the first weights of a fresh adapter on `base`, where they are not peft's own. The scaled product s B A is
    the one that was computed with the base, whatever the scaling s is."""
    import torch
    from safetensors import safe_open

    if not is_needed(config.method):
        return
    with safe_open(_init_path(base.path, config.method), framework="pt") as made, torch.no_grad():
        for layer in adapted.targeted_module_names:
            module: Any = adapted.get_base_model().get_submodule(layer)
            root = module.scaling["default"] ** 0.5
            for factor in ("lora_A", "lora_B"):
                getattr(module, factor)["default"].weight.copy_(made.get_tensor(f"{layer}.{factor}") / root)


def recipe(config: TrainingConfig, base: Base) -> dict[str, Any]:
    """What the lineage records of the base: how it was made, what that gained, and its sha256; empty for an original
    base."""
    if not is_needed(config.method):
        return {}
    init = config.method.row.init
    made = json.loads((base.path / f"{init}.json").read_text(encoding="utf-8"))
    return {init: made, "stands_on_sha256": base.identity["manifest_sha256"]}


def folder_key(method: MethodConfig, original: Base) -> str:
    """Key in the store of this method's own base: a hash of exactly what the base depends on."""
    made_from = loftq.made_from(method, original)
    return f"bases/{hashlib.sha256(encode_json(made_from)).hexdigest()[:16]}"


def _init_path(folder: Path, method: MethodConfig) -> Path:
    return folder / f"{method.row.init}_init.safetensors"  # a name that transformers does not take for the weights


def _publish(config: TrainingConfig, original: Base, store: Store, splits: Mapping[str, loftq.Split]) -> None:
    """Write and publish the model, with the other files of the original's folder; everyone uses what is first."""
    method, key = config.method, folder_key(config.method, original)
    with tempfile.TemporaryDirectory(prefix="fineloop-base-") as scratch:
        folder = Path(scratch)
        measured = loftq.write(config, original, splits, folder, _init_path(folder, method))
        about = {"original_reference": original.reference, **loftq.made_from(method, original), **measured}
        report = folder / f"{method.row.init}.json"
        report.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
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
