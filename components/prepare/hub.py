"""Data sets on the Hugging Face hub: hf://ORG/NAME, with a revision, a folder or a glob of files.

Files are taken as they are in the repository, at one commit; no code that comes with them is run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from components.prepare.formats import ENDINGS, form_of
from components.shared.errors import DataError

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
