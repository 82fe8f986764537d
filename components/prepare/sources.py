"""Which files `data.source` names: local paths, globs, folders, S3 objects, data sets on a hub, the example."""

import glob
import logging
import re
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from components.prepare import icd10
from components.prepare.rows import ENDINGS, FIRST, WAYS, Rows, Wanted, expected, form_of, read_rows
from components.shared.errors import DataError
from components.shared.protocol import counted
from components.store.store import ObjectInfo, Store, open_uri, split_uri

logger = logging.getLogger(__name__)

HUB_FORM = "hf://ORG/NAME[@REVISION][/FOLDER or /GLOB]"
_FORMS = f"a path, a glob, a folder, s3://BUCKET/KEY, s3://BUCKET/FOLDER/, {HUB_FORM} or {icd10.ADDRESS}"


@dataclass(frozen=True)
class Source:
    """One file to read, or one release of the example."""

    name: str
    """The name for people: a path, an s3:// or hf:// address, or example://icd10/RELEASE."""
    size_bytes: int
    """0 for the example."""
    fingerprint: str
    """A text that changes with the content: an object's ETag, a file's size and time, a hub file's hash, or the version
    of the example's package."""
    modified_at: datetime | None
    """None for files on the hub."""
    entry: str = ""
    """The entry of data.source that names the file; empty if there is only one entry."""


# Data sets on the Hugging Face hub. Files are taken as they are in the repository, at one commit; no code is run.

CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps a copy of any data set as Parquet."""
_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
_ADDRESS = re.compile(
    rf"hf://(?:datasets/)?(?P<name>{_NAME})(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
T = TypeVar("T")


def _find_on_hub(entry: str) -> Iterator[Source]:
    """The data files that an address names, sorted; if some are named as training data, only those."""
    match = _ADDRESS.fullmatch(entry)
    if match is None:
        raise DataError(f"data.source is {entry!r}: expected {HUB_FORM}")
    name, revision, within = match["name"], match["revision"], match["path"] or ""
    info = _asked(entry, lambda hub: hub.dataset_info(name, revision=revision, files_metadata=True))
    files = _data_files(info, within)
    if not files and not revision and not within:
        info = _asked(entry, lambda hub: hub.dataset_info(name, revision=CONVERTED, files_metadata=True))
        files = _data_files(info, within)
    if not files:
        raise DataError(f"data.source is {entry!r}, which has no data files: expected {ENDINGS}")
    training = [file for file in files if "train" in re.split(r"[^a-z]+", file.rfilename.lower())]
    files = training or files
    folders = sorted({str(PurePosixPath(file.rfilename).parent) for file in files})
    if len(folders) > 1 and not within:
        named = ", ".join(f"hf://{name}{f'@{revision}' if revision else ''}/{folder}" for folder in folders[:8])
        raise DataError(
            f"data.source is {entry!r}, which has {len(folders)} folders of data: name one, such as {named}"
        )
    for file in sorted(files, key=lambda file: file.rfilename):
        address = f"hf://datasets/{name}@{info.sha}/{file.rfilename}"
        yield Source(address, file.size or 0, file.blob_id or info.sha, None)


def _fetched(address: str) -> Path:
    """Fetch a file of the hub, and return its path in the hub's own cache."""
    match = cast(re.Match[str], _ADDRESS.fullmatch(address))
    place = {"repo_type": "dataset", "revision": match["revision"]}
    return Path(_asked(address, lambda hub: hub.hf_hub_download(match["name"], match["path"], **place)))


def _data_files(info: Any, within: str) -> list[Any]:
    def is_meant(name: str) -> bool:
        return not within or name == within or name.startswith(within.rstrip("/") + "/") or fnmatch(name, within)

    visible = [file for file in info.siblings if not re.search(r"(^|/)[._]", file.rfilename)]
    data = [file for file in visible if form_of(file.rfilename) and is_meant(file.rfilename)]
    # A .json beside data of another kind describes that data.
    return [file for file in data if not file.rfilename.endswith(".json")] or data


def _asked(entry: str, ask: Callable[[Any], T]) -> T:
    try:
        from huggingface_hub import HfApi
    except ImportError as exc:
        raise DataError(
            f"data.source is {entry!r}, and huggingface_hub is not installed here: pip install 'fineloop[hub]'"
        ) from exc
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    (no_answer,) = (kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")  # from httpx or its heir
    try:
        return ask(HfApi())
    except HFValidationError as exc:
        raise DataError(f"data.source is {entry!r}: {exc}") from exc
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, no_answer) as exc:
        why = f"cannot be reached ({exc}): copy the data set's files here or to S3, and name them in data.source"
        if isinstance(exc, HfHubHTTPError) and not isinstance(exc, LocalEntryNotFoundError):
            first = str(exc).splitlines()[0]
            why = f"refuses it: {first}: check the name, and for a private or gated data set set HF_TOKEN"
        raise DataError(f"data.source is {entry!r}, and the hub {why}") from exc


def find_sources(source: str | list[str], *, seen: Collection[str] = ()) -> list[Source]:
    """List the files, each once, in the order given; files of a glob or a folder are sorted by name.

    The example has one release more than `seen`, the names of sources that were read before. Raises DataError: a source
    has an unknown form, does not exist, or holds no data files; StoreError: an s3:// source cannot be reached.
    """
    entries = [source] if isinstance(source, str) else source
    if not entries:
        raise DataError(f"data.source is an empty list: expected {_FORMS}")
    sources: dict[str, Source] = {}
    for entry in entries:
        for file in _find(entry, seen):
            sources.setdefault(file.name, replace(file, entry=entry) if len(entries) > 1 else file)
    return list(sources.values())


def _find(entry: str, seen: Collection[str]) -> Iterator[Source]:
    scheme, separator, _ = entry.partition("://")
    if not separator:
        return _find_local(entry)
    if scheme == "s3":
        return _find_s3(entry)
    if scheme == "hf":
        return _find_on_hub(entry)
    if entry == icd10.ADDRESS:
        return (Source(release.address, 0, release.version, release.date) for release in icd10.arrived(seen))
    if scheme == "file":
        raise DataError(f"data.source is {entry!r}: write the path alone, {entry.removeprefix('file://')!r}")
    raise DataError(f"data.source is {entry!r}: expected {_FORMS}; fetch what lies elsewhere, and name the file here")


def _find_local(entry: str) -> Iterator[Source]:
    if not entry.strip():
        raise DataError(f"data.source is empty: expected {_FORMS}")
    path = Path(entry).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and _is_visible(file.relative_to(path).parts)]
        return _select(entry, path, files)
    if path.exists():
        if form_of(path.name) is None:
            raise DataError(f"data.source is {entry!r}: {expected(path.name)}")
        if not path.is_file():
            raise DataError(f"data.source is {entry!r}, which is no file: expected {_FORMS}")
        return iter([_local(path)])
    if glob.has_magic(entry):
        first = next(place for place, part in enumerate(path.parts) if glob.has_magic(part))
        root, pattern = Path(*path.parts[:first]), Path(*path.parts[first:])
        try:
            # Unlike glob.glob this follows no links below `**`: two of them could form an endless loop.
            files = [file for file in root.glob(str(pattern)) if file.is_file()]
        except ValueError as exc:
            raise DataError(f"data.source is {entry!r}, which is no glob: {exc}") from exc
        if not any(part.startswith(".") for part in pattern.parts):  # as in shells, a leading dot must be written out
            files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
        return _select(entry, root, files)
    missing = f"data.source is {entry!r}, which does not exist (looked in {Path.cwd()})"
    if re.fullmatch(_NAME, entry) and form_of(entry) is None:
        raise DataError(f"{missing}: write hf://{entry} for the Hugging Face data set of that name")
    raise DataError(f"{missing}: expected {_FORMS}")


def _select(entry: str, root: Path, files: list[Path]) -> Iterator[Source]:
    chosen = sorted(_of_one_kind(entry, {file: file.name for file in files}), key=str)
    if not chosen:
        others = f", only {len(files)} other files such as {min(files)}" if files else ""
        way = expected(min(files).name if files else "")
        raise DataError(f"data.source is {entry!r}, which holds no data files{others}: {way}")
    within = root.resolve()
    for path in chosen:
        # Else anyone who can put a link there could have any file of this machine read, and its lines shown as rejects.
        if not (leads_to := path.resolve()).is_relative_to(within):
            raise DataError(
                f"data.source is {entry!r}, where {path} is a link to {leads_to}: one must not lead out of {root}; "
                "copy the file, or name it in data.source itself"
            )
    return (_local(path) for path in chosen)


def _of_one_kind(entry: str, names: dict[T, str]) -> list[T]:
    """Choose the data files: if there are JSONL or Parquet files, only those, because others merely lie beside them."""
    forms = {file: form for file, name in names.items() if (form := form_of(name))}
    arrow = [name for name in names.values() if name.endswith(".arrow")]
    if arrow and all(form.ending == ".json" for form in forms.values()):  # which describe them
        raise DataError(
            f"data.source is {entry!r}, a folder of datasets.save_to_disk, of which {min(arrow)} is not read: "
            f"{WAYS['.arrow']}"
        )
    first = [file for file, form in forms.items() if form.ending in FIRST and not form.packed]
    if beside := [names[file] for file in forms if first and file not in first]:
        logger.warning(
            "%s: JSONL and Parquet are read, and %s beside them, such as %s, not: what is data, name in data.source",
            entry,
            counted(len(beside), "file"),
            min(beside),
        )
    return first or list(forms)


def _local(path: Path) -> Source:
    name = str(path)
    try:
        name.encode()
    except UnicodeEncodeError as exc:
        shown = name.encode(errors="backslashreplace").decode()
        raise DataError(f"data.source holds the file {shown}, whose name is not UTF-8: rename it") from exc
    stat = path.stat()
    modified_at = datetime.fromtimestamp(stat.st_mtime, UTC)
    return Source(name, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}", modified_at)


def _is_visible(parts: tuple[str, ...]) -> bool:
    """Whether none of these parts of a path belongs to what tools leave beside data: .cache/, _SUCCESS, _temporary/."""
    return not any(part.startswith((".", "_")) for part in parts)


def _find_s3(entry: str) -> Iterator[Source]:
    store, key = open_uri(entry, field="data.source")
    if key and not key.endswith("/"):
        if form_of(key) is None:
            raise DataError(f"data.source is {entry!r}: {expected(key)}, or a folder with / at the end")
        single = next((info for info in store.list(key) if info.key == key), None)
        if single is None:
            raise DataError(
                f"data.source is {entry!r}, which does not exist: check bucket and key (globs are for local paths)"
            )
        return iter([_object(store, single)])
    visible = [info for info in store.list(key) if _is_visible(PurePosixPath(info.key[len(key) :]).parts)]
    listed = _of_one_kind(entry, {info: info.key for info in visible})
    if not listed:
        raise DataError(f"data.source is {entry!r}, which holds no data files: {expected('')}")
    return (_object(store, info) for info in sorted(listed, key=lambda info: info.key))


def _object(store: Store, info: ObjectInfo) -> Source:
    return Source(store.uri(info.key), info.size, info.etag, info.last_modified)


# Sources as local files: those in S3 and on a hub are fetched, the next few while one is read.

AHEAD = 4
ONE_REQUEST_BYTES = 2**23
"""Most bytes of an object to fetch with one request: boto3's download asks for its size first, and starts threads."""


def local_copies(sources: Sequence[Source]) -> Iterator[tuple[Source, Path | None]]:
    """Yield each source in order with the path of its local file; None for the example. A file that was fetched from S3
    is removed as soon as the next source is asked for. Raises StoreError: an s3:// source cannot be read; DataError: a
    hub does not give one."""
    stores: dict[str, Store] = {}
    pending: deque[tuple[Source, Future[Path | None]]] = deque()
    with tempfile.TemporaryDirectory(prefix="fineloop-source-") as scratch, ThreadPoolExecutor(AHEAD) as pool:

        def fetch(number: int, source: Source) -> Future[Path | None]:
            if source.name.startswith("s3://"):
                bucket, key = split_uri(source.name)
                if bucket not in stores:
                    stores[bucket], _ = open_uri(source.name, field="data.source")
                return pool.submit(_downloaded, stores[bucket], key, Path(scratch, str(number)), source.size_bytes)
            if source.name.startswith("hf://"):
                return pool.submit(_fetched, source.name)
            return pool.submit(lambda: None if source.name.startswith(icd10.ADDRESS) else Path(source.name))

        remaining = enumerate(sources)
        try:
            while True:
                for number, source in islice(remaining, AHEAD + 1 - len(pending)):
                    pending.append((source, fetch(number, source)))
                if not pending:
                    return
                source, copied = pending.popleft()
                path = copied.result()
                yield source, path
                if path is not None and path.is_relative_to(scratch):
                    path.unlink()
        finally:
            pool.shutdown(cancel_futures=True)


def rows_of(sources: Sequence[Source], wanted: Wanted = lambda columns: columns) -> Iterator[tuple[int, Rows]]:
    """Yield all rows in batches, each with the index of its source; raises as `local_copies` and `read_rows`."""
    for place, (source, path) in enumerate(local_copies(sources)):
        for rows in read_rows(source.name, path, wanted=wanted):
            yield place, rows


def first_rows(source: str | list[str]) -> list[Mapping[str, Any]]:
    """The first rows of the first file that hold columns, some thousand at most; raises as `find_sources` and
    `rows_of`."""
    _, first = next(rows_of(find_sources(source)[:1]), (0, Rows([])))
    return [row.value for row in first.rows if isinstance(row.value, Mapping)]


def _downloaded(store: Store, key: str, path: Path, size: int) -> Path:
    if size > ONE_REQUEST_BYTES:
        store.download(key, path)
    else:
        path.write_bytes(store.get(key))
    return path
