"""The formats of data files by the ending of their name, and their bytes, unpacked."""

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
"""Endings that take precedence: if a folder has files with one of these, its other files are not data."""
ENDINGS = f"a name ending in {', '.join(KINDS)}, each also with .gz or .zst"

WAYS = {
    ".xlsx": "save the sheet as CSV (UTF-8)", ".xls": "save the sheet as CSV (UTF-8)", ".ods": "save the sheet as CSV",
    ".arrow": "write it as Parquet, as datasets.load_from_disk(FOLDER).to_parquet(FILE) does for each split",
    ".feather": "write it as Parquet, as pandas.read_feather(FILE).to_parquet(FILE) does",
    ".zip": "unpack it", ".bz2": "unpack it", ".xz": "unpack it", ".tar": "unpack it",
}  # fmt: skip
"""What to do with a file of another format, by its ending."""


def expected(name: str) -> str:
    """The endings that data files have, and what to do with a file of this name, which has another."""
    way = WAYS.get(PurePosixPath(name.lower()).suffix)
    return f"expected {ENDINGS}{f'; {way}' if way else ''}"


class Form(NamedTuple):
    """The form of a data file, by its name."""

    kind: Kind
    ending: str
    packed: str
    """The compression: gzip, zstd or empty for none."""


def form_of(name: str) -> Form | None:
    """The form of the file with this name; None if it is not a data file."""
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
