"""Which files `data.source` names: local paths, globs, folders, S3 objects and folders, and the built-in example."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from components.shared.errors import DataError

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
EXAMPLES = ("example://icd10",)

_FORMS = f"a path, a glob, a folder, s3://BUCKET/KEY, s3://BUCKET/FOLDER/ or {', '.join(EXAMPLES)}"
_ENDINGS = "a name ending in .jsonl, .ndjson or .parquet"


@dataclass(frozen=True)
class Source:
    """One file to read, or the example."""

    name: str
    """As people know it: a path, an s3:// URI, or example://NAME."""
    size_bytes: int
    """0 for the example."""


def find_sources(source: str | list[str]) -> list[Source]:
    """List the files, each once, in the order given; those of a glob or a folder sorted by name.

    Raises:
        DataError: a source has no form we know, does not exist, or holds no data files.
        StoreError: an s3:// source cannot be reached.
    """
    entries = [source] if isinstance(source, str) else source
    if not entries:
        raise DataError(f"data.source is an empty list: expected {_FORMS}")
    found: dict[str, Source] = {}
    for entry in entries:
        for each in _find(entry):
            found.setdefault(each.name, each)
    return list(found.values())


def is_data_file(name: str) -> bool:
    """Whether the name's ending says JSONL or Parquet."""
    return PurePosixPath(name).suffix.lower() in JSON_LINES + PARQUET


def _find(entry: str) -> Iterator[Source]:
    scheme, separator, _ = entry.partition("://")
    if not separator:
        return _find_local(entry)
    if scheme == "s3":
        return _find_s3(entry)
    if entry in EXAMPLES:
        return iter([Source(entry, 0)])
    raise DataError(f"data.source is {entry!r}: expected {_FORMS}")


def _find_local(entry: str) -> Iterator[Source]:
    if not entry.strip():
        raise DataError(f"data.source is empty: expected {_FORMS}")
    path = Path(entry).expanduser()
    if path.is_dir():
        names = [str(each) for each in path.rglob("*") if each.is_file() and _is_visible(each.relative_to(path).parts)]
        return _select(entry, names)
    if path.exists():
        if not is_data_file(path.name):
            raise DataError(f"data.source is {entry!r}: expected {_ENDINGS}")
        return iter([_local(str(path))])
    if glob.has_magic(entry):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        return _select(entry, [name for name in names if Path(name).is_file()])
    raise DataError(f"data.source is {entry!r}, which does not exist (looked in {Path.cwd()}): expected {_FORMS}")


def _select(entry: str, names: list[str]) -> Iterator[Source]:
    chosen = sorted(name for name in names if is_data_file(name))
    if not chosen:
        others = f", only {len(names)} other files such as {min(names)}" if names else ""
        raise DataError(f"data.source is {entry!r}, which holds no data files{others}: expected {_ENDINGS}")
    return (_local(name) for name in chosen)


def _local(name: str) -> Source:
    return Source(name, Path(name).stat().st_size)


def _is_visible(parts: tuple[str, ...]) -> bool:
    """False for what tools leave beside data: .cache/, _SUCCESS, _temporary/."""
    return not any(part.startswith((".", "_")) for part in parts)


def _find_s3(entry: str) -> Iterator[Source]:
    from components.registry.store import open_uri

    store, key = open_uri(entry, field="data.source")
    if key and not key.endswith("/"):
        if not is_data_file(key):
            raise DataError(f"data.source is {entry!r}: expected {_ENDINGS}, or a folder with / at the end")
        sizes = {info.key: info.size for info in store.list(key)}
        if key not in sizes:
            raise DataError(
                f"data.source is {entry!r}, which does not exist: check bucket and key (globs are for local paths)"
            )
        return iter([Source(entry, sizes[key])])
    listed = {
        info.key: info.size
        for info in store.list(key)
        if is_data_file(info.key) and _is_visible(PurePosixPath(info.key[len(key) :]).parts)
    }
    if not listed:
        raise DataError(f"data.source is {entry!r}, which holds no data files: expected {_ENDINGS}")
    return (Source(store.uri(each), listed[each]) for each in sorted(listed))
