"""Which files `data.source` names: local paths, globs, folders, S3 objects, data sets on a hub, the example."""

import glob
import logging
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from components.prepare.rows import ENDINGS, FIRST, WAYS, example_release, expected, form_of
from components.shared.errors import DataError
from components.shared.protocol import counted

if TYPE_CHECKING:
    from components.store.store import ObjectInfo, Store


# Data sets on the Hugging Face hub: hf://ORG/NAME, with a revision, a folder or a glob of files.
#
# Files are taken as they are in the repository, at one commit; no code that comes with them is run.

SCHEME = "hf://"
FORM = "hf://ORG/NAME[@REVISION][/FOLDER or /GLOB]"
CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps a copy of any data set as Parquet."""
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_ADDRESS = re.compile(
    r"hf://(?:datasets/)?(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
Found = TypeVar("Found")


@dataclass(frozen=True)
class HubFile:
    """One data file of a repository."""

    address: str
    size_bytes: int
    fingerprint: str
    modified_at: datetime | None


def is_address(entry: str) -> bool:
    """Whether the entry is an address on the hub."""
    return entry.startswith(SCHEME)


def is_id(entry: str) -> bool:
    """Whether the entry looks like ORG/NAME, and not like a file."""
    return _ID.fullmatch(entry) is not None and form_of(entry) is None


def find(entry: str) -> list[HubFile]:
    """The data files that an address names, sorted; if some are named as training data, only those.

    Raises:
        DataError: there is no such data set, it has no data files or several kinds of them, or the hub is out of reach.
    """
    match = _ADDRESS.fullmatch(entry)
    if match is None:
        raise DataError(f"data.source is {entry!r}: expected {FORM}")
    name, revision, within = match["name"], match["revision"], match["path"] or ""
    info = _asked(entry, lambda hub: hub.dataset_info(name, revision=revision, files_metadata=True))
    files = _data_files(info, within)
    if not files and not revision and not within:
        info = _asked(entry, lambda hub: hub.dataset_info(name, revision=CONVERTED, files_metadata=True))
        files = _data_files(info, within)
    if not files:
        raise DataError(f"data.source is {entry!r}, which has no data files: expected {ENDINGS}")
    training = [each for each in files if "train" in re.split(r"[^a-z]+", each.rfilename.lower())]
    files = training or files
    folders = sorted({str(PurePosixPath(each.rfilename).parent) for each in files})
    if len(folders) > 1 and not within:
        named = ", ".join(f"hf://{name}{f'@{revision}' if revision else ''}/{folder}" for folder in folders[:8])
        raise DataError(
            f"data.source is {entry!r}, which has {len(folders)} folders of data: name one, such as {named}"
        )
    return [
        HubFile(f"{SCHEME}datasets/{name}@{info.sha}/{each.rfilename}", each.size or 0, each.blob_id or info.sha, None)
        for each in sorted(files, key=lambda each: each.rfilename)
    ]


def fetched(address: str) -> Path:
    """Fetch a file that `find` gave, and return its path in the hub's own cache.

    Raises:
        DataError: it cannot be fetched.
    """
    match = _ADDRESS.fullmatch(address)
    assert match is not None
    return Path(
        _asked(
            address,
            lambda hub: hub.hf_hub_download(
                match["name"], match["path"], repo_type="dataset", revision=match["revision"]
            ),
        )
    )


def _data_files(info: Any, within: str) -> list[Any]:
    def is_meant(name: str) -> bool:
        return not within or name == within or name.startswith(within.rstrip("/") + "/") or fnmatch(name, within)

    visible = [each for each in info.siblings if not re.search(r"(^|/)[._]", each.rfilename)]
    found = [each for each in visible if form_of(each.rfilename) and is_meant(each.rfilename)]
    # A .json beside data of another kind describes that data.
    return [each for each in found if not each.rfilename.endswith(".json")] or found


def _hub(entry: str) -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as exc:
        raise DataError(
            f"data.source is {entry!r}, and huggingface_hub is not installed here: pip install 'fineloop[hub]'"
        ) from exc
    return HfApi()


def _asked(entry: str, ask: Callable[[Any], Found]) -> Found:
    hub = _hub(entry)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    (no_answer,) = (kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")  # from httpx or its heir
    try:
        return ask(hub)
    except HFValidationError as exc:
        raise DataError(f"data.source is {entry!r}: {exc}") from exc
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as exc:
        raise DataError(_out_of_reach(entry, exc)) from exc
    except HfHubHTTPError as exc:
        raise DataError(
            f"data.source is {entry!r}, and the hub refuses it: {str(exc).splitlines()[0]}: check the name, and for a "
            "private or gated data set set HF_TOKEN"
        ) from exc
    except no_answer as exc:
        raise DataError(_out_of_reach(entry, exc)) from exc


def _out_of_reach(entry: str, exc: Exception) -> str:
    return (
        f"data.source is {entry!r}, and the hub cannot be reached ({exc}): copy the data set's files here or "
        "to S3, and name them in data.source"
    )


# The S3 buckets that hold data.


class Buckets:
    """Buckets by their name. Each is opened once, because a client costs a tenth of a second."""

    def __init__(self) -> None:
        self._stores: dict[str, Store] = {}

    def open(self, uri: str) -> "tuple[Store, str]":
        """The bucket that an s3:// address names, and the key within it.

        Raises:
            UserError: it is no s3:// address.
        """
        from components.store.store import open_uri, split_uri

        bucket, key = split_uri(uri)
        if bucket not in self._stores:
            self._stores[bucket], _ = open_uri(uri, field="data.source")
        return self._stores[bucket], key


logger = logging.getLogger(__name__)

T = TypeVar("T")

EXAMPLES = ("example://icd10",)

_FORMS = f"a path, a glob, a folder, s3://BUCKET/KEY, s3://BUCKET/FOLDER/, {FORM} or {', '.join(EXAMPLES)}"


@dataclass(frozen=True)
class Source:
    """One file to read, or the example."""

    name: str
    """The name for people: a path, an s3:// or hf:// address, or example://NAME."""
    size_bytes: int
    """0 for the example."""
    fingerprint: str
    """A text that changes with the content: an object's ETag, a file's size and time, a hub file's hash, or the version
    of the example's package."""
    modified_at: datetime | None
    """None for the example and for files on the hub."""
    entry: str = ""
    """The entry of data.source that names the file; empty if there is only one entry."""


def find_sources(source: str | list[str]) -> list[Source]:
    """List the files, each once, in the order given; files of a glob or a folder are sorted by name.

    Raises:
        DataError: a source has an unknown form, does not exist, or holds no data files.
        StoreError: an s3:// source cannot be reached.
    """
    buckets = Buckets()
    entries = [source] if isinstance(source, str) else source
    if not entries:
        raise DataError(f"data.source is an empty list: expected {_FORMS}")
    found: dict[str, Source] = {}
    for entry in entries:
        for each in _find(entry, buckets):
            found.setdefault(each.name, replace(each, entry=entry) if len(entries) > 1 else each)
    return list(found.values())


def _find(entry: str, buckets: Buckets) -> Iterator[Source]:
    scheme, separator, _ = entry.partition("://")
    if not separator:
        return _find_local(entry)
    if scheme == "s3":
        return _find_s3(entry, buckets)
    if is_address(entry):
        return (Source(each.address, each.size_bytes, each.fingerprint, None) for each in find(entry))
    if entry in EXAMPLES:
        return iter([Source(entry, 0, example_release(), None)])
    if scheme == "file":
        raise DataError(f"data.source is {entry!r}: write the path alone, {entry.removeprefix('file://')!r}")
    raise DataError(f"data.source is {entry!r}: expected {_FORMS}; fetch what lies elsewhere, and name the file here")


def _find_local(entry: str) -> Iterator[Source]:
    if not entry.strip():
        raise DataError(f"data.source is empty: expected {_FORMS}")
    path = Path(entry).expanduser()
    if path.is_dir():
        files = [each for each in path.rglob("*") if each.is_file() and _is_visible(each.relative_to(path).parts)]
        return _select(entry, path, files)
    if path.exists():
        if form_of(path.name) is None:
            raise DataError(f"data.source is {entry!r}: {expected(path.name)}")
        if not path.is_file():
            raise DataError(f"data.source is {entry!r}, which is no file: expected {_FORMS}")
        return iter([_local(path)])
    if glob.has_magic(entry):
        root, pattern = _split_glob(path)
        try:
            # Unlike glob.glob this follows no links below `**`: two of them could form an endless loop.
            files = [each for each in root.glob(str(pattern)) if each.is_file()]
        except ValueError as exc:
            raise DataError(f"data.source is {entry!r}, which is no glob: {exc}") from exc
        if not any(part.startswith(".") for part in pattern.parts):  # as in shells, a leading dot must be written out
            files = [each for each in files if not any(part.startswith(".") for part in each.relative_to(root).parts)]
        return _select(entry, root, files)
    missing = f"data.source is {entry!r}, which does not exist (looked in {Path.cwd()})"
    if is_id(entry):
        raise DataError(f"{missing}: write hf://{entry} for the Hugging Face data set of that name")
    raise DataError(f"{missing}: expected {_FORMS}")


def _split_glob(path: Path) -> tuple[Path, Path]:
    """The folder that a glob begins in, and the rest."""
    first = next(place for place, part in enumerate(path.parts) if glob.has_magic(part))
    return Path(*path.parts[:first]), Path(*path.parts[first:])


def _select(entry: str, root: Path, files: list[Path]) -> Iterator[Source]:
    chosen = sorted(_of_one_kind(entry, {each: each.name for each in files}), key=str)
    if not chosen:
        others = f", only {len(files)} other files such as {min(files)}" if files else ""
        way = expected(min(files).name if files else "")
        raise DataError(f"data.source is {entry!r}, which holds no data files{others}: {way}")
    within = root.resolve()
    for each in chosen:
        # Else anyone who can put a link there could have any file of this machine read, and its lines shown as rejects.
        if not (leads_to := each.resolve()).is_relative_to(within):
            raise DataError(
                f"data.source is {entry!r}, where {each} is a link to {leads_to}: one must not lead out of {root}; "
                "copy the file, or name it in data.source itself"
            )
    return (_local(each) for each in chosen)


def _of_one_kind(entry: str, names: dict[T, str]) -> list[T]:
    """Choose the data files: if there are JSONL or Parquet files, only those, because others merely lie beside them."""
    found = {each: form for each, name in names.items() if (form := form_of(name))}
    arrow = [name for name in names.values() if name.endswith(".arrow")]
    if arrow and all(form.ending == ".json" for form in found.values()):  # which describe them
        raise DataError(
            f"data.source is {entry!r}, a folder of datasets.save_to_disk, of which {min(arrow)} is not read: "
            f"{WAYS['.arrow']}"
        )
    first = [each for each, form in found.items() if form.ending in FIRST and not form.packed]
    if beside := [names[each] for each in found if first and each not in first]:
        logger.warning(
            "%s: JSONL and Parquet are read, and %s beside them, such as %s, not: what is data, name in data.source",
            entry,
            counted(len(beside), "file"),
            min(beside),
        )
    return first or list(found)


def _local(path: Path) -> Source:
    name = str(path)
    try:
        name.encode()
    except UnicodeEncodeError as exc:
        shown = name.encode(errors="backslashreplace").decode()
        raise DataError(f"data.source holds the file {shown}, whose name is not UTF-8: rename it") from exc
    found = path.stat()
    modified_at = datetime.fromtimestamp(found.st_mtime, UTC)
    return Source(name, found.st_size, f"{found.st_size}-{found.st_mtime_ns}", modified_at)


def _is_visible(parts: tuple[str, ...]) -> bool:
    """Whether none of these parts of a path belongs to what tools leave beside data: .cache/, _SUCCESS, _temporary/."""
    return not any(part.startswith((".", "_")) for part in parts)


def _find_s3(entry: str, buckets: Buckets) -> Iterator[Source]:
    store, key = buckets.open(entry)
    if key and not key.endswith("/"):
        if form_of(key) is None:
            raise DataError(f"data.source is {entry!r}: {expected(key)}, or a folder with / at the end")
        found = next((info for info in store.list(key) if info.key == key), None)
        if found is None:
            raise DataError(
                f"data.source is {entry!r}, which does not exist: check bucket and key (globs are for local paths)"
            )
        return iter([_object(store, found)])
    visible = [info for info in store.list(key) if _is_visible(PurePosixPath(info.key[len(key) :]).parts)]
    listed = _of_one_kind(entry, {info: info.key for info in visible})
    if not listed:
        raise DataError(f"data.source is {entry!r}, which holds no data files: {expected('')}")
    return (_object(store, info) for info in sorted(listed, key=lambda info: info.key))


def _object(store: "Store", info: "ObjectInfo") -> Source:
    return Source(store.uri(info.key), info.size, info.etag, info.last_modified)


# Sources as local files: those in S3 and on a hub are fetched, the next few while one is read.

AHEAD = 4
ONE_REQUEST_BYTES = 2**23
"""Most bytes of an object to fetch with one request: boto3's download asks for its size first, and starts threads."""


def local_copies(sources: Sequence[Source]) -> Iterator[tuple[Source, Path | None]]:
    """Yield each source in order with the path of its local file; None for the example. A file that was fetched from S3
    is removed as soon as the next source is asked for.

    Raises:
        StoreError: an s3:// source cannot be read.
        DataError: a hub does not give one.
    """
    buckets = Buckets()
    pending: deque[tuple[Source, Future[Path | None]]] = deque()
    with tempfile.TemporaryDirectory(prefix="fineloop-source-") as scratch, ThreadPoolExecutor(AHEAD) as pool:

        def fetch(number: int, source: Source) -> Future[Path | None]:
            if source.name.startswith("s3://"):
                store, key = buckets.open(source.name)
                path = Path(scratch, str(number), Path(key).name)
                return pool.submit(_downloaded, store, key, path, source.size_bytes)
            if is_address(source.name):
                return pool.submit(fetched, source.name)
            found: Future[Path | None] = Future()
            found.set_result(None if source.name in EXAMPLES else Path(source.name))
            return found

        try:
            for number, source in enumerate(sources):
                pending.append((source, fetch(number, source)))
                if len(pending) > AHEAD:
                    yield from _next(pending, Path(scratch))
            while pending:
                yield from _next(pending, Path(scratch))
        finally:
            pool.shutdown(cancel_futures=True)


def _next(pending: "deque[tuple[Source, Future[Path | None]]]", scratch: Path) -> Iterator[tuple[Source, Path | None]]:
    source, found = pending.popleft()
    path = found.result()
    yield source, path
    if path is not None and path.is_relative_to(scratch):
        path.unlink()


def _downloaded(store: "Store", key: str, path: Path, size: int) -> Path:
    if size > ONE_REQUEST_BYTES:
        store.download(key, path)
    else:
        body = store.get(key)
        path.parent.mkdir()
        path.write_bytes(body)
    return path
