"""One split of a dataset as tokens, in files that processes map into memory, and share there.

tokens.npy     int32, all rows end to end
labelled.npy   bool, of each token whether it is to be learned
rows.npy       ROW, one for each row, and one without tokens for each row that is left out
ids.npy        uint8, the ids of the rows' records in UTF-8, end to end

Whoever plans with lengths alone reads rows.npy alone. The same rows give the same bytes.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from components.prepare.dataset import Record
from ray_jobs.text.batching import TokenizedSplit

TOKENS, LABELLED, ROWS, IDS = FILES = ("tokens.npy", "labelled.npy", "rows.npy", "ids.npy")
ROW = np.dtype(
    [
        ("record", "<i4"),  # its number in the split
        ("length", "<i4"),  # tokens; 0 where the answer leaves no room for a prompt
        ("prompt", "<i4"),  # of them before the last answer
        ("answers", "<i4"),  # of them to be learned
        ("cut", "<i4"),  # 1 where its record's prompt is not whole
        ("id", "<i4"),  # bytes of the record's id
    ]
)
Rows = npt.NDArray[Any]
"""Of dtype ROW."""


def write(folder: Path, parts: Iterable[tuple[Sequence[Record], TokenizedSplit]]) -> None:
    """Write some records after the other, with their tokens; memory holds no more than a part."""
    number = 0
    with ExitStack() as files:
        tokens = files.enter_context(_GrowingArray(folder / TOKENS, "<i4"))
        labelled = files.enter_context(_GrowingArray(folder / LABELLED, "|b1"))
        rows = files.enter_context(_GrowingArray(folder / ROWS, ROW))
        ids = files.enter_context(_GrowingArray(folder / IDS, "|u1"))
        for records, split in parts:
            part = _rows(split, {record.id: number + place for place, record in enumerate(records)})
            number += len(records)
            tokens.append(split.tokens)
            labelled.append(split.labelled)
            rows.append(part)
            ids.append(np.frombuffer("".join([*split.ids, *split.too_long]).encode(), np.uint8))


def _rows(split: TokenizedSplit, numbers: dict[str, int]) -> Rows:
    names, kept = [*split.ids, *split.too_long], len(split)
    cut = frozenset(split.cut)
    rows = np.zeros(len(names), ROW)
    rows["record"] = [numbers[name] for name in names]
    rows["length"][:kept] = split.lengths
    rows["prompt"][:kept] = split.num_prompt_tokens
    rows["answers"][:kept] = split.num_answer_tokens
    rows["cut"] = [name in cut for name in names]
    rows["id"] = [len(name.encode()) for name in names]
    return rows


def load_rows(folder: Path) -> Rows:
    """What rows.npy says, those that are left out included."""
    return _mapped(folder / ROWS)


def is_kept(rows: Rows) -> npt.NDArray[np.bool_]:
    """Of each row, whether it has tokens."""
    kept: npt.NDArray[np.bool_] = rows["length"] > 0
    return kept


def load_ids(folder: Path) -> "Ids":
    """The ids of the records of the same rows."""
    return Ids(_mapped(folder / IDS), np.cumsum(load_rows(folder)["id"], dtype=np.int64))


def load(folder: Path) -> TokenizedSplit:
    """The whole split; its tokens lie in the files until they are looked at."""
    rows = load_rows(folder)
    names, kept = load_ids(folder), is_kept(rows)
    return TokenizedSplit(
        ids=names.take(np.flatnonzero(kept)),
        tokens=_mapped(folder / TOKENS),
        labelled=_mapped(folder / LABELLED),
        offsets=np.concatenate([[0], np.cumsum(rows["length"][kept], dtype=np.int64)]),
        num_prompt_tokens=rows["prompt"][kept],
        too_long=names.take(first_of_each_record(rows, ~kept)),
        cut=names.take(first_of_each_record(rows, kept & (rows["cut"] > 0))),
        answers=rows["answers"][kept],
    )


def first_of_each_record(rows: Rows, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Of the rows that are chosen, by a flag for each, the first of each record."""
    places = np.flatnonzero(chosen)
    return places[np.unique(rows["record"][places], return_index=True)[1]]


@dataclass(frozen=True)
class Ids(Sequence[str]):
    """The ids of some rows, read where one asks for them."""

    utf8: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    """Of each row of the file."""
    places: npt.NDArray[np.int64] | None = None
    """The rows that are meant; None means all."""

    def take(self, places: npt.NDArray[np.int64]) -> "Ids":
        """Those of the rows at these places."""
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
    """An .npy file of one dimension, written from its beginning to its end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._file, self._dtype, self._length = path.open("wb"), np.dtype(dtype), 0
        self._write_header()

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self._length += len(values)

    def _write_header(self) -> None:
        # NumPy leaves room in it for a first axis that grows (lib/format.py, GROWTH_AXIS_MAX_DIGITS).
        described = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": described, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "_GrowingArray":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()


def _mapped(path: Path) -> npt.NDArray[Any]:
    """Without NumPy's class for such arrays, each slice of which costs a microsecond more."""
    mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)
    return mapped
