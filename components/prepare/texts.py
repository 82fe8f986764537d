"""Keeps many texts in a file, with 24 bytes of memory for each."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_AT_ONCE = 2**20
"""The size of the blocks whose texts are read together, in bytes."""


class Texts(Sequence[str]):
    """Some of the texts of a file, in order."""

    def __init__(self, path: Path, begins: "npt.NDArray[np.int64]", sizes: "npt.NDArray[np.int64]") -> None:
        """`begins` are the texts' places in the file, `sizes` their lengths, both in bytes."""
        self._path, self._begins, self._sizes = path, begins, sizes

    @classmethod
    def write(cls, path: Path, batches: Iterable[Sequence[str]]) -> "Texts":
        """Write the texts to a new file."""
        import numpy as np

        parts = [np.zeros(0, np.int64)]
        with path.open("wb") as file:
            for texts in batches:
                encoded = [text.encode() for text in texts]
                parts.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
                file.write(b"".join(encoded))
        sizes = np.concatenate(parts)
        return cls(path, np.cumsum(sizes) - sizes, sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return list(self._read(self._begins[place], self._sizes[place]))
        (text,) = self._read(self._begins[place : place + 1], self._sizes[place : place + 1])
        return text

    def __iter__(self) -> Iterator[str]:
        return self._read(self._begins, self._sizes)

    def _read(self, begins: "npt.NDArray[np.int64]", sizes: "npt.NDArray[np.int64]") -> Iterator[str]:
        """Read the texts; those that follow each other in the same block of the file are read at once."""
        import numpy as np

        ends = begins + sizes
        follows = (begins[1:] == ends[:-1]) & (np.diff(begins // _AT_ONCE) == 0)
        first = np.flatnonzero(np.concatenate([[True], ~follows])) if len(sizes) else np.zeros(0, np.int64)
        with self._path.open("rb") as file:
            for start, end in zip(first.tolist(), [*first[1:].tolist(), len(sizes)], strict=False):
                file.seek(begins[start])
                read = file.read(int(ends[end - 1] - begins[start]))
                place = 0
                for size in sizes[start:end].tolist():
                    yield read[place : place + size].decode()
                    place += size
