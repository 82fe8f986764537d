"""What a dataset is, its records, and how they are read from its folder `datasets/<dataset_id>/` in the store."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from components.shared.errors import IntegrityError
from components.store import folders

if TYPE_CHECKING:
    from components.store.store import Store

Role = Literal["system", "user", "assistant", "tool"]
SplitName = Literal["train", "eval", "replay"]
"""Production gives the answers in `replay` before a training mixes it with train; few datasets have this split."""

FORMAT = 1
"""Version of the files and of the id's recipe; part of the id."""
REJECTS = "rejects.parquet"
WEIGHT = "weight"
"""Key of a turn of the assistant that is not to be learned; its value is 0."""
RECORDS_AT_ONCE = 1000
"""Records per batch when a split is read in batches."""
WHERE_ANY = ("calls", "tools", "group", "source")
"""Optional columns, which are written only if any record has a value there."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str
    more: str = ""
    """The turn's other fields as a JSON object: tool_calls, tool_call_id, name, weight; empty where it has none."""

    def as_json(self) -> list[str]:
        """Role, content and, unless empty, `more`; without it the list is the same as in releases without tools."""
        return [self.role, self.content, *([self.more] if self.more else [])]

    @property
    def is_learned(self) -> bool:
        """Whether the turn may be trained on where its role is: not with weight 0."""
        return not self.more or WEIGHT not in json.loads(self.more)


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
    """The name of the group that the record belongs to; empty where it stands for itself."""
    source: str = ""
    """The entry of data.source that it came from, where there are several; not part of the record's identity."""

    @property
    def asked(self) -> str | list[dict[str, str]]:
        """The prompt for people: its text, or, for a conversation, the role and the content or calls of each turn."""
        if [turn.role for turn in self.prompt] == ["user"]:
            return self.prompt[0].content
        return [{"role": turn.role, "content": turn.content or turn.more} for turn in self.prompt]

    @property
    def answer_text(self) -> str:
        """The answer for people: its text, or its calls where it has no text."""
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


def load_split(store: "Store", uri: str, split: SplitName) -> list[Record]:
    """Read one split of the dataset at `uri`, verified against its manifest, in the order of the records' key hash.

    Raises:
        ObjectMissing: there is no dataset, or it has no manifest.
        IntegrityError: a file is not what the manifest lists.
    """
    return [record for batch in read_split(store, uri, split) for record in batch]


def read_split(store: "Store", uri: str, split: SplitName) -> Iterator[list[Record]]:
    """Read one split as `load_split` does, RECORDS_AT_ONCE records at a time, so that they need not all be in memory.

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
    read = 0
    with tempfile.TemporaryDirectory(prefix="fineloop-dataset-") as scratch:
        for path in paths:
            local_path = Path(scratch, "part.parquet")
            store.download(f"{key}/{path}", local_path)
            found = folders.digest_of(local_path)
            if found != manifest.files[path]:
                raise IntegrityError(f"{uri}/{path} is {found}, its manifest says {manifest.files[path]}")
            for batch in pq.ParquetFile(local_path).iter_batches(RECORDS_AT_ONCE):
                read += batch.num_rows
                yield [record_of(row) for row in batch.to_pylist()]
    expected = manifest.about.get(f"{split}_records", read)
    if read != expected:
        raise IntegrityError(f"{uri} has {read} records in {split}/, its manifest says {expected}")


def record_of(row: Mapping[str, Any]) -> Record:
    """The record that a row of a dataset's files holds."""
    turns = [Message(turn["role"], turn["content"], turn.get("more", "")) for turn in row["prompt"]]
    return Record(row["id"], turns, row["answer"], *(row.get(name, "") for name in WHERE_ANY))
