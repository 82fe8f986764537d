"""One split of a dataset as tokens, in memory-mapped files that processes share.

tokens.npy     int32, the tokens of all rows, concatenated
labelled.npy   bool, one flag per token: whether it is labelled, that is, contributes to the loss
rows.npy       dtype ROW, one entry for each row, and one of length 0 for each row that is left out
ids.npy        uint8, the ids of the rows' records in UTF-8, concatenated

The same rows give the same bytes.
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


def write(folder: Path, parts: Iterable[tuple[Sequence[Record], TokenizedSplit]]) -> None:
    """Write the tokens of all parts, each some records with their tokens; memory holds only one part at a time."""
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
    cut, cut_system = frozenset(split.cut), frozenset(split.cut_system)
    rows = np.zeros(len(names), ROW)
    rows["record"] = [numbers[name] for name in names]
    rows["length"][:kept] = split.lengths
    rows["prompt"][:kept] = split.num_prompt_tokens
    rows["answers"][:kept] = split.num_answer_tokens
    rows["cut"] = [(name in cut) + (name in cut_system) for name in names]
    rows["id"] = [len(name.encode()) for name in names]
    return rows


def load_rows(folder: Path) -> Rows:
    """The rows of rows.npy, including those that are left out."""
    return _mapped(folder / ROWS)


def is_kept(rows: Rows) -> npt.NDArray[np.bool_]:
    """One flag per row: whether it has tokens, that is, is not left out."""
    kept: npt.NDArray[np.bool_] = rows["length"] > 0
    return kept


def load_ids(folder: Path) -> "Ids":
    """The ids of the records of all rows in rows.npy."""
    return Ids(_mapped(folder / IDS), np.cumsum(load_rows(folder)["id"], dtype=np.int64))


def load(folder: Path) -> TokenizedSplit:
    """Load the whole split; its tokens are memory-mapped, and read only on access."""
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
        cut_system=names.take(first_of_each_record(rows, kept & (rows["cut"] > 1))),
        answers=rows["answers"][kept],
    )


def has(folder: Path, numbers: dict[str, int], expected: TokenizedSplit) -> bool:
    """Whether the records with these numbers, which ascend, by id, have exactly the rows of `expected`, tokens and all.

    In the file the rows that are left out follow the others of each part, so that rows are compared in the records'
    order.
    """
    rows, wanted = load_rows(folder), _rows(expected, numbers)
    places = np.flatnonzero(np.isin(rows["record"], [*numbers.values()]))
    places, order = (
        at[np.argsort(of["record"][at], kind="stable")] for of, at in ((rows, places), (wanted, np.arange(len(wanted))))
    )
    names = np.array([*expected.ids, *expected.too_long], object)[order]
    kept = (np.cumsum(is_kept(rows)) - 1)[places[is_kept(rows)[places]]]
    return (
        np.array_equal(rows[places], wanted[order])
        and [*load_ids(folder).take(places)] == names.tolist()
        and load(folder).take(kept.tolist()).digest == expected.digest
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
        """The ids at `places` of this selection."""
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()


def _mapped(path: Path) -> npt.NDArray[Any]:
    """Map a file into memory as a plain ndarray: slicing numpy.memmap costs a microsecond more each time."""
    mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)
    return mapped
