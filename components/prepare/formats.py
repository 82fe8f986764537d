"""Files of rows by the ending of their name, packed or not, and their bytes."""

import gzip
import io
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple, cast

Kind = Literal["lines", "json", "csv", "parquet"]

KINDS: dict[str, Kind] = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
PACKED = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
FIRST = (".jsonl", ".ndjson", ".parquet")
"""Where a folder has files with one of these, the others lie beside its data and are none of it."""
ENDINGS = f"a name ending in {', '.join(KINDS)}, each also with .gz or .zst"


class Form(NamedTuple):
    """What a file's name says of it."""

    kind: Kind
    ending: str
    packed: str
    """gzip, zstd or nothing."""


def form_of(name: str) -> Form | None:
    """None where the name is no data file's."""
    path = PurePosixPath(name.lower())
    packed = PACKED.get(path.suffix, "")
    ending = PurePosixPath(path.stem).suffix if packed else path.suffix
    return Form(KINDS[ending], ending, packed) if ending in KINDS else None


def opened(path: Path, packed: str) -> BinaryIO:
    """The file's bytes, unpacked as they are read.

    Raises:
        OSError: it cannot be opened.
    """
    if packed == "gzip":
        return cast(BinaryIO, gzip.open(path))
    if packed == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")
