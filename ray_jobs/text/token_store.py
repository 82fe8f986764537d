"""The tokens of a dataset's splits, created once and stored with it: `datasets/<dataset_id>/tokens/<digest>/`.

The digest is a hash of `recipe`, that is, of everything besides the records that determines the tokens. Retries, the
trials of a sweep and later trainings reuse them. The workers of a machine read one shared copy there. Whoever may write
to the store can write other tokens there, so that lineage names them, and an evaluation reads none.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from components.config.train import LossOn
from components.prepare.dataset import Message, Record, SplitName, read_split
from components.registry.identity import TOKENS
from components.shared.errors import Conflict, DataError, IntegrityError
from components.store import folders
from components.store.store import Store, encode_json
from ray_jobs.base.local_cache import cache_dir, forget_unused, once, touch
from ray_jobs.text.batching import TokenizedSplit, tokenize
from ray_jobs.text.chat_format import ChatFormat

# One split as tokens, in memory-mapped .npy files that processes share: the tokens of all rows, concatenated, whether
# each is labelled, an entry for each row, and the ids of the rows' records in UTF-8. The same rows give the same bytes.

TOKENS_FILE, LABELLED, ROWS, IDS = FILES = ("tokens.npy", "labelled.npy", "rows.npy", "ids.npy")
ROW = np.dtype(
    [
        ("record", "<i4"),  # index of its record in the split
        ("length", "<i4"),  # number of tokens; 0 where the row is left out
        ("prompt", "<i4"),  # number of tokens before the last answer
        ("answers", "<i4"),  # number of labelled tokens
        ("cut", "<i4"),  # 1 where its record's prompt was shortened, 2 where its system message was too
        ("id", "<i4"),  # number of bytes of the record's id
    ]
)
Rows = npt.NDArray[Any]
"""An array of dtype ROW."""


def write_files(folder: Path, parts: Iterable[tuple[Sequence[Record], TokenizedSplit]]) -> None:
    """Write the tokens of all parts, each some records with their tokens; memory holds only one part at a time."""
    number = 0
    with ExitStack() as stack:
        kinds: dict[str, npt.DTypeLike] = {TOKENS_FILE: "<i4", LABELLED: "|b1", ROWS: ROW, IDS: "|u1"}
        files = [stack.enter_context(_GrowingArray(folder / name, kind)) for name, kind in kinds.items()]
        for records, split in parts:
            rows = _rows(split, {record.id: number + place for place, record in enumerate(records)})
            number += len(records)
            ids = np.frombuffer("".join([*split.ids, *split.too_long]).encode(), np.uint8)
            arrays: list[npt.NDArray[Any]] = [split.tokens, split.labelled, rows, ids]
            for file, values in zip(files, arrays, strict=True):
                file.append(values)


def _rows(split: TokenizedSplit, numbers: dict[str, int]) -> Rows:
    names, kept = [*split.ids, *split.too_long], len(split)
    cut, cut_system = frozenset(split.cut), frozenset(split.cut_system)
    rows = np.zeros(len(names), ROW)
    rows["record"] = [numbers[name] for name in names]
    rows["length"][:kept] = split.lengths
    rows["prompt"][:kept] = split.num_prompt_tokens
    rows["answers"][:kept] = split.num_answer_tokens
    rows["cut"] = [(name in cut) + (name in cut_system) for name in names]
    rows["id"] = [len(name.encode()) for name in names]
    return rows


def mapped_rows(folder: Path) -> Rows:
    """All rows, including those that are left out."""
    return _mapped(folder / ROWS)


def is_kept(rows: Rows) -> npt.NDArray[np.bool_]:
    """One flag per row: whether it is not left out."""
    kept: npt.NDArray[np.bool_] = rows["length"] > 0
    return kept


def mapped_ids(folder: Path) -> "Ids":
    """The ids of the records of all rows."""
    return Ids(_mapped(folder / IDS), np.cumsum(mapped_rows(folder)["id"], dtype=np.int64))


def mapped_split(folder: Path) -> TokenizedSplit:
    """The whole split; its tokens are read on access."""
    rows = mapped_rows(folder)
    names, kept = mapped_ids(folder), is_kept(rows)
    return TokenizedSplit(
        ids=names.take(np.flatnonzero(kept)),
        tokens=_mapped(folder / TOKENS_FILE),
        labelled=_mapped(folder / LABELLED),
        offsets=np.concatenate([[0], np.cumsum(rows["length"][kept], dtype=np.int64)]),
        num_prompt_tokens=rows["prompt"][kept],
        too_long=names.take(first_of_each_record(rows, ~kept)),
        cut=names.take(first_of_each_record(rows, kept & (rows["cut"] > 0))),
        cut_system=names.take(first_of_each_record(rows, kept & (rows["cut"] > 1))),
        answers=rows["answers"][kept],
    )


def has_rows(folder: Path, numbers: dict[str, int], expected: TokenizedSplit) -> bool:
    """Whether the records with these numbers, which ascend, by id, have exactly the rows of `expected`, tokens and all.

    In the file the rows that are left out follow the others of each part, so that rows are compared in the records'
    order.
    """
    rows, wanted = mapped_rows(folder), _rows(expected, numbers)
    places = np.flatnonzero(np.isin(rows["record"], [*numbers.values()]))
    places, order = (
        at[np.argsort(of["record"][at], kind="stable")] for of, at in ((rows, places), (wanted, np.arange(len(wanted))))
    )
    names = np.array([*expected.ids, *expected.too_long], object)[order]
    kept = (np.cumsum(is_kept(rows)) - 1)[places[is_kept(rows)[places]]]
    return (
        np.array_equal(rows[places], wanted[order])
        and [*mapped_ids(folder).take(places)] == names.tolist()
        and mapped_split(folder).take(kept.tolist()).digest == expected.digest
    )


def first_of_each_record(rows: Rows, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Indices of the first chosen row of each record; `chosen` has one flag per row."""
    places = np.flatnonzero(chosen)
    return places[np.unique(rows["record"][places], return_index=True)[1]]


@dataclass(frozen=True)
class Ids(Sequence[str]):
    """The ids of some rows' records, decoded on access."""

    utf8: npt.NDArray[np.uint8]
    """The ids of all rows in the file, concatenated."""
    ends: npt.NDArray[np.int64]
    """End of each row's id in `utf8`, for all rows in the file."""
    places: npt.NDArray[np.int64] | None = None
    """Indices of the selected rows; None means all."""

    def take(self, places: npt.NDArray[np.int64]) -> "Ids":
        return Ids(self.utf8, self.ends, places if self.places is None else self.places[places])

    def __len__(self) -> int:
        return len(self.ends if self.places is None else self.places)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        row = place if self.places is None else int(self.places[place])
        return self.utf8[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes().decode()


class _GrowingArray:
    """A one-dimensional .npy file that is written by appending."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._file, self._dtype, self._length = path.open("wb"), np.dtype(dtype), 0
        self._write_header()

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self._length += len(values)

    def _write_header(self) -> None:
        # NumPy reserves space in the header for a growing first axis (lib/format.py, GROWTH_AXIS_MAX_DIGITS).
        described = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": described, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "_GrowingArray":
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()


def _mapped(path: Path) -> npt.NDArray[Any]:
    """Map a file into memory as a plain ndarray: slicing numpy.memmap costs a microsecond more each time."""
    mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)
    return mapped


FORMAT = 5
"""Version of the files, and of how records become tokens: increment it when either changes."""
LIBRARIES = ("jinja2", "tokenizers", "transformers")
"""Libraries whose releases may tokenize a text differently."""
KEPT_S = 24 * 3600.0
"""Seconds for which a machine keeps tokens that no process uses."""
SAMPLE = 256
"""Records whose stored tokens are compared before each training: if 2 of 100 are others, 99 of 100 trainings see it."""
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
        write_files(Path(scratch), parts)
        files = {name: Path(scratch, name) for name in FILES}
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
    count = len(np.unique(mapped_rows(folder)["record"]))
    drawn = frozenset(np.random.default_rng().choice(count, min(SAMPLE, count), replace=False).tolist())
    sample: dict[int, Record] = {}
    total = 0
    for some in parts:
        sample |= {number: record for number, record in enumerate(some, total) if number in drawn}
        total += len(some)
    numbers = {record.id: number for number, record in sample.items()}
    return total == count and has_rows(folder, numbers, tokenized([*sample.values()]))


def load(store: Store, stored: StoredTokens) -> TokenizedSplit:
    """Load the selected rows; the tokens of all rows are in memory-mapped files of this machine, read on access. Raises
    ObjectMissing: the tokens are gone from the store, and this machine has no copy; IntegrityError: they are not what
    their manifest lists."""
    split = mapped_split(_pulled(store, stored))
    return split if stored.rows is None else split.take(stored.rows.tolist())


def load_rows(store: Store, stored: StoredTokens) -> tuple[Rows, Ids]:
    """The entries of all rows, including those that are left out, and their records' ids; raises as `load`."""
    folder = _pulled(store, stored)
    return mapped_rows(folder), mapped_ids(folder)


def _pulled(store: Store, stored: StoredTokens) -> Path:
    path = _root() / stored.manifest_sha256
    touch(path)
    once(path, lambda scratch: folders.pull(store, stored.key, scratch, manifest_sha256=stored.manifest_sha256))
    forget_unused(path.parent, KEPT_S)
    return path


def _root() -> Path:
    return cache_dir().with_name(TOKENS)


def _tokenizer_sha256(tokenizer: Any) -> str:
    """A sha256 of the tokenizer's definition, without its padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and type(tokenizer).__module__.startswith("transformers."):
        made_of = json.loads(backend.to_str())
        return hashlib.sha256(encode_json({**made_of, "padding": None, "truncation": None})).hexdigest()
    with tempfile.TemporaryDirectory(prefix="fineloop-tokenizer-") as scratch:
        tokenizer.save_pretrained(scratch)  # with its own code, where it has some
        files = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        return hashlib.sha256(encode_json({path.name: folders.digest_of(path)["sha256"] for path in files})).hexdigest()
