"""What a dataset is: its records, its id, and its folder `datasets/<dataset_id>/` in the store."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from components.shared.errors import Conflict, IntegrityError
from components.store import folders

if TYPE_CHECKING:
    from components.store.store import Store

logger = logging.getLogger(__name__)

Role = Literal["system", "user", "assistant", "tool"]
SplitName = Literal["train", "eval"]

FORMAT = 1
"""Version of the files and of the id's recipe; part of the id."""
REJECTS = "rejects.parquet"
_WHERE_ANY = ("calls", "tools", "group", "source")
"""What a split has a column for where any of its records has it."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str
    more: str = ""
    """What the turn carries beside its text, as JSON of an object: tool_calls, tool_call_id, name."""

    def as_json(self) -> list[str]:
        """Role and text, and what else there is; of a turn with no more, what a release without tools made of it."""
        return [self.role, self.content, *([self.more] if self.more else [])]


@dataclass(frozen=True, slots=True)
class Record:
    """One example: what the model is given and what it should answer."""

    id: str
    """The row's own id, or 16 hex digits of the content's hash."""
    prompt: list[Message]
    """Every turn before the answer; at least one is the user's."""
    answer: str
    calls: str = ""
    """The tool calls that the answer makes, as JSON of a list."""
    tools: str = ""
    """The tools that may be called, as JSON of a list."""
    group: str = ""
    """What the record belongs to, with others of the same; empty where it stands for itself."""
    source: str = ""
    """The entry of data.source that it came from, where there are several; no part of what the record is."""

    @property
    def asked(self) -> str | list[dict[str, str]]:
        """The question for people: its text, or of a conversation who says, or calls, what in each turn."""
        if [turn.role for turn in self.prompt] == ["user"]:
            return self.prompt[0].content
        return [{"role": turn.role, "content": turn.content or turn.more} for turn in self.prompt]

    @property
    def answer_text(self) -> str:
        """The answer for people: its text, or else its calls."""
        return self.answer or self.calls


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that became no record."""

    source: str
    line: int
    """1-based line of a JSONL or CSV file, 1-based row of any other."""
    reason: str
    row: str
    """The row's text, cut to 2000 characters."""


@dataclass(frozen=True)
class DatasetFolder:
    """Where a dataset lies."""

    dataset_id: str
    uri: str
    created: bool
    """False when the store already held it."""


def dataset_id(train: Iterable[Record], evaluation: Iterable[Record]) -> str:
    """`d` and 15 hex digits of a hash over both splits' records, in their order."""
    digest = hashlib.sha256(f"fineloop dataset {FORMAT}\n".encode())
    for split, records in (("train", train), ("eval", evaluation)):
        digest.update(f"{split}\n".encode())
        for record in records:
            digest.update(json.dumps(_identity(record), ensure_ascii=False).encode())
            digest.update(b"\n")
    return f"d{digest.hexdigest()[:15]}"


def _identity(record: Record) -> list[Any]:
    """The identity of a record."""
    turns = [turn.as_json() for turn in record.prompt]
    # A dataset without any of them is named as by a release that knew nothing of them.
    tools = [record.calls, record.tools] if record.calls or record.tools or record.group else []
    return [record.id, turns, record.answer, *tools, *([record.group] if record.group else [])]


def publish(
    store: "Store",
    *,
    train: Sequence[Record],
    evaluation: Sequence[Record],
    rejects: Sequence[Reject],
    profile: Mapping[str, Any],
) -> DatasetFolder:
    """Write the dataset's folder, or nothing when the store holds these records already.

    The first run to publish some records also decides the profile and the rejects that are kept beside them, each by
    itself.
    """
    identity = dataset_id(train, evaluation)
    key = f"datasets/{identity}"
    folder = DatasetFolder(identity, store.uri(key), created=True)
    present = DatasetFolder(identity, store.uri(key), created=False)
    if folders.find_manifest(store, key) is not None:
        return present
    about = {
        "kind": "dataset",
        "format": FORMAT,
        "dataset_id": identity,
        "train_records": len(train),
        "eval_records": len(evaluation),
        "rejected": len(rejects),
    }
    with tempfile.TemporaryDirectory(prefix="fineloop-prepare-") as scratch:
        files: dict[str, bytes | Path] = {
            "train/part-00000.parquet": _write_records(train, Path(scratch, "train.parquet")),
            "eval/part-00000.parquet": _write_records(evaluation, Path(scratch, "eval.parquet")),
            REJECTS: _write_rejects(rejects, Path(scratch, REJECTS)),
            "profile.json": json.dumps(profile, ensure_ascii=False, indent=2).encode(),
        }
        try:
            folders.publish(store, key, files, about=about, identity=())
        except Conflict:
            # Another run published the same records meanwhile, with a profile of its own: either will do.
            logger.info("%s was published by another run at the same time", folder.uri)
            return present
    return folder


def load_split(store: "Store", uri: str, split: SplitName) -> list[Record]:
    """Read one split of the dataset at `uri`, verified against its manifest, in the order of the records' key hash.

    Raises:
        ObjectMissing: there is no dataset, or it has no manifest.
        IntegrityError: a file is not what the manifest lists.
    """
    import pyarrow.parquet as pq

    key = store.key(uri).rstrip("/")
    manifest = folders.read_manifest(store, key)
    paths = sorted(path for path in manifest.files if path.startswith(f"{split}/"))
    if not paths:
        raise IntegrityError(f"{uri} has no {split} split: its manifest lists {', '.join(sorted(manifest.files))}")
    records: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="fineloop-dataset-") as scratch:
        for path in paths:
            local_path = Path(scratch, "part.parquet")
            store.download(f"{key}/{path}", local_path)
            found = folders.digest_of(local_path)
            if found != manifest.files[path]:
                raise IntegrityError(f"{uri}/{path} is {found}, its manifest says {manifest.files[path]}")
            for batch in pq.ParquetFile(local_path).iter_batches():
                records.extend(_record(row) for row in batch.to_pylist())
    return records


def _record(row: Mapping[str, Any]) -> Record:
    turns = [Message(turn["role"], turn["content"], turn.get("more", "")) for turn in row["prompt"]]
    return Record(row["id"], turns, row["answer"], *(row.get(name, "") for name in _WHERE_ANY))


def _write_records(records: Sequence[Record], path: Path) -> Path:
    import pyarrow as pa

    turns = [turn for record in records for turn in record.prompt]
    offsets = [0]
    for record in records:
        offsets.append(offsets[-1] + len(record.prompt))
    fields = ["role", "content", *(["more"] if any(turn.more for turn in turns) else [])]
    messages = pa.StructArray.from_arrays(
        [pa.array([getattr(turn, field) for turn in turns], pa.string()) for field in fields], names=fields
    )
    columns = ["id", "answer", *(name for name in _WHERE_ANY if any(getattr(each, name) for each in records))]
    table = pa.table(
        {name: pa.array([getattr(record, name) for record in records], pa.string()) for name in columns}
    ).add_column(1, "prompt", pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages))
    return _write(table, path)


def _write_rejects(rejects: Sequence[Reject], path: Path) -> Path:
    import pyarrow as pa

    table = pa.table(
        {
            "source": pa.array([reject.source for reject in rejects], pa.string()),
            "line": pa.array([reject.line for reject in rejects], pa.int64()),
            "reason": pa.array([reject.reason for reject in rejects], pa.string()),
            "row": pa.array([reject.row for reject in rejects], pa.string()),
        }
    )
    return _write(table, path)


def _write(table: Any, path: Path) -> Path:
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")
    return path
