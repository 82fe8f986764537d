"""The tokens of a dataset's splits, created once and stored with it: `datasets/<dataset_id>/tokens/<digest>/`.

The digest is a hash of `recipe`, that is, of everything besides the records that determines the tokens. Retries, the
trials of a sweep and later trainings reuse them. The workers of a machine read one shared copy there. Whoever may write
to the store can write other tokens there, so that lineage names them, and an evaluation reads none.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from components.config.train import LossOn
from components.prepare.dataset import Message, Record, SplitName, read_split
from components.registry.identity import TOKENS
from components.shared.errors import Conflict, DataError, IntegrityError
from components.store import folders
from components.store.store import Store, encode_json
from ray_jobs.base.local_cache import cache_dir, forget_unused, once, touch
from ray_jobs.text import token_files
from ray_jobs.text.batching import TokenizedSplit, tokenize
from ray_jobs.text.chat_format import ChatFormat
from ray_jobs.text.token_files import Ids, Rows

FORMAT = 5
"""Version of the files, and of how records become tokens: increment it when either changes."""
LIBRARIES = ("jinja2", "tokenizers", "transformers")
"""Libraries whose releases may tokenize a text differently."""
KEPT_S = 24 * 3600.0
"""Seconds for which a machine keeps tokens that no process uses."""
SAMPLE = 256
"""Number of records whose stored tokens are compared before each training: where 2 of 100 are not what the dataset
gives, it is seen in 99 of 100 cases."""
PROBE = Record("probe", [Message("user", "question")], "answer")


@dataclass(frozen=True)
class StoredTokens:
    """A reference to stored tokens, small enough to send to every worker."""

    key: str
    manifest_sha256: str
    content_sha256: str
    """As `Manifest` has it: tokens that are made again have the same."""
    rows: npt.NDArray[np.int64] | None = None
    """Indices of the selected rows, in this order; None means all."""


def recipe(chat: ChatFormat, split: SplitName, max_length: int, loss_on: LossOn) -> dict[str, Any]:
    """Everything besides the records that determines the tokens of a split, as JSON values."""
    try:
        probe = chat.rows(PROBE)
    except DataError as exc:
        probe = [[str(exc)]]
    return {
        "format": FORMAT,
        "split": split,
        "max_length": max_length,
        "loss_on": loss_on,
        "tokenizer_sha256": _tokenizer_sha256(chat.tokenizer),
        "special_tokens": {name: str(token) for name, token in chat.tokenizer.special_tokens_map.items()},
        "template_sha256": hashlib.sha256(str(chat.tokenizer.chat_template).encode()).hexdigest(),
        "probe": probe,  # a template may write today's date
        "thinking": chat.thinking,
        "in_parts": chat.in_parts,
        "stops": sorted(chat.stops),
        "end_of_turn": chat.end_of_turn,
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }


def ensure(
    store: Store, dataset_uri: str, split: SplitName, chat: ChatFormat, *, max_length: int, loss_on: LossOn = "last"
) -> StoredTokens:
    """Reference to the split's tokens, which are created if they do not exist. Two processes that do create the same.

    Raises:
        DataError: a record cannot be formatted with the base's chat template.
        ObjectMissing: there is no such dataset.
        IntegrityError: a file of the dataset is not what its manifest lists, or the stored tokens are others than a
            sample of its records gives.
    """
    how = recipe(chat, split, max_length, loss_on)
    key = f"{store.key(dataset_uri).rstrip('/')}/{TOKENS}/{hashlib.sha256(encode_json(how)).hexdigest()[:16]}"
    others = IntegrityError(
        f"{store.uri(key)} does not hold the tokens that this release makes of {dataset_uri}: somebody has written "
        "others there; remove that folder, and the next training makes them anew"
    )
    if manifest := folders.find_manifest(store, key):
        stored = StoredTokens(key, manifest.sha256, manifest.content_sha256)
        folder, records = _pulled(store, stored), read_split(store, dataset_uri, split)
        if not _has_sample(folder, records, lambda sample: tokenize(sample, chat, max_length, loss_on)):
            raise others
        return stored
    parts = ((some, tokenize(some, chat, max_length, loss_on)) for some in read_split(store, dataset_uri, split))
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as scratch:
        token_files.write(Path(scratch), parts)
        files = {name: Path(scratch, name) for name in token_files.FILES}
        try:
            manifest = folders.publish(store, key, files, about={"kind": "tokens", **how})
        except Conflict as exc:  # whoever makes them at the same time makes the same
            raise others from exc
    return StoredTokens(key, manifest.sha256, manifest.content_sha256)


def _has_sample(
    folder: Path, parts: Iterable[list[Record]], tokenized: Callable[[list[Record]], TokenizedSplit]
) -> bool:
    """Whether the tokens in `folder` are of as many records as the split has, and those of SAMPLE records, drawn anew
    each time, are what `tokenized` makes of them."""
    count = len(np.unique(token_files.load_rows(folder)["record"]))
    drawn = frozenset(np.random.default_rng().choice(count, min(SAMPLE, count), replace=False).tolist())
    sample: dict[int, Record] = {}
    total = 0
    for some in parts:
        sample |= {number: record for number, record in enumerate(some, total) if number in drawn}
        total += len(some)
    numbers = {record.id: number for number, record in sample.items()}
    return total == count and token_files.has(folder, numbers, tokenized([*sample.values()]))


def load(store: Store, stored: StoredTokens) -> TokenizedSplit:
    """Load the selected rows; the tokens of all rows are in memory-mapped files of this machine, read on access.

    Raises:
        ObjectMissing: the tokens are gone from the store, and this machine has no copy.
        IntegrityError: they are not what their manifest lists.
    """
    split = token_files.load(_pulled(store, stored))
    return split if stored.rows is None else split.take(stored.rows.tolist())


def load_rows(store: Store, stored: StoredTokens) -> tuple[Rows, Ids]:
    """The entries of all rows without their tokens, including rows that are left out, and their records' ids; raises as
    `load`."""
    folder = _pulled(store, stored)
    return token_files.load_rows(folder), token_files.load_ids(folder)


def _pulled(store: Store, stored: StoredTokens) -> Path:
    path = _root() / stored.manifest_sha256
    touch(path)
    once(path, lambda scratch: folders.pull(store, stored.key, scratch, manifest_sha256=stored.manifest_sha256))
    forget_unused(path.parent, KEPT_S)
    return path


def _root() -> Path:
    return cache_dir().with_name(TOKENS)


def _tokenizer_sha256(tokenizer: Any) -> str:
    """A sha256 of the tokenizer's definition, without its padding and truncation, which are not used here."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and type(tokenizer).__module__.startswith("transformers."):
        made_of = json.loads(backend.to_str())
        return hashlib.sha256(encode_json({**made_of, "padding": None, "truncation": None})).hexdigest()
    with tempfile.TemporaryDirectory(prefix="fineloop-tokenizer-") as scratch:
        tokenizer.save_pretrained(scratch)  # with its own code, where it has some
        files = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        return hashlib.sha256(encode_json({path.name: folders.digest_of(path)["sha256"] for path in files})).hexdigest()
