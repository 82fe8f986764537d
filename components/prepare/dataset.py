"""What a dataset is: its records, as objects and as Arrow batches, its files, its folder, and which hold a record."""

import contextlib
import hashlib
import json
import logging
import re
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice, pairwise, repeat
from json.encoder import encode_basestring
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.prepare.rows import in_batches
from components.records import runs
from components.registry import signing, versions
from components.registry.aliases import list_aliases
from components.registry.between_runs import OF_PEOPLE
from components.registry.cache import READS_AT_ONCE
from components.registry.collect import DATASETS, RUNS
from components.registry.identity import TOKENS, version_key
from components.registry.lineage import Ancestor
from components.shared.errors import Conflict, IntegrityError, ObjectMissing
from components.store import folders
from components.store.store import ObjectFile, ObjectInfo, Store, encode_json

Role = Literal["system", "user", "assistant", "tool"]
Origin = Literal["", "own", "edited", "labelled"]
"""Whose words the answer to a logged request is: the model's own, an edit of them, or what somebody says is right."""
Drawn = Literal["", "audit", "outcome", "census"]
"""Why a logged request may judge: a hash drew it, its outcome comes anyway, or people judged its whole log."""
SplitName = Literal["train", "eval", "replay"]
"""Production gives the answers in `replay` before a training mixes it with train; few datasets have this split."""

FORMAT = 2
"""Version of the files and of the id's recipe; part of the id."""
UNDIVIDED = 1
"""The former format: the id is one hash over all splits, so that each is checked by reading all."""
REJECTS = "rejects.parquet"
WEIGHT = "weight"
"""Key of a turn of the assistant that is not to be learned; its value is 0."""
RECORDS_AT_ONCE = 1000
"""Records per batch when a split is read in batches."""
OF_LOG = ("origin", "served_by", "session", "user", "rater", "drawn")
"""Columns of what a log, and feedback, say of a record."""
WHERE_ANY = ("calls", "tools", "group", "source", *OF_LOG)
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
    origin: Origin = ""
    """Empty for rows that are no logged requests, as all below."""
    served_by: str = ""
    """The version that answered."""
    session: str = ""
    user: str = ""
    """The hash of who asked."""
    rater: str = ""
    """The hash of whose feedback counts, or else of who asked."""
    drawn: Drawn = ""

    @property
    def may_judge(self) -> bool:
        """Whether versions may be compared on it: no logged request that was chosen by how good its answer was."""
        return not self.origin or bool(self.drawn)

    @property
    def shown_prompt(self) -> str | list[dict[str, str]]:
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


class Hashes(NamedTuple):
    """The hashes that decide the split and the duplicates of some records: lists of sha256."""

    key: list[bytes]
    """Of what identifies the record: its id when the row gave one, else its prompt."""
    place: list[bytes]
    """Of what decides its split: its group where it has one, else its key."""
    content: list[bytes]
    """Of prompt and answer."""
    turns: list[bytes]
    """Of the prompt's turns."""


def load_split(store: Store, uri: str, split: SplitName) -> list[Record]:
    """All of one split, as `read_split` reads it."""
    return [record for batch in read_split(store, uri, split) for record in batch]


def read_split(store: Store, uri: str, split: SplitName) -> Iterator[list[Record]]:
    """Read one split of the dataset at `uri`, some records at a time, in the order of their key hash.

    Its files are verified against the manifest, and at the end its records against the dataset's id. Raises
    ObjectMissing: there is no dataset, or it has no manifest; IntegrityError: a file is not what the manifest lists, or
    the records are not those that the id was made of.
    """
    for batch in _read(store, uri, split):
        yield records_of(batch)


def require_promised(store: Store, uri: str) -> None:
    """Require of every split what `read_split` does, and raise as it does."""
    paths = folders.read_manifest(store, store.key(uri).rstrip("/")).files
    for split in _splits(paths):
        for _ in _read(store, uri, split):
            pass


def _read(store: Store, uri: str, split: SplitName) -> Iterator[pa.RecordBatch]:
    key = store.key(uri).rstrip("/")
    manifest = folders.read_manifest(store, key)
    splits = _splits(manifest.files)
    if split not in splits:
        raise IntegrityError(f"{uri} has no {split} split: its manifest lists {', '.join(sorted(manifest.files))}")
    if manifest.about.get("format") == UNDIVIDED:
        undivided = hashlib.sha256(f"fineloop dataset {UNDIVIDED}\n".encode())
        for name in splits:
            undivided.update(f"{name}\n".encode())
            for batch in _batches(store, uri, manifest, name):
                undivided.update(identities(completed(batch)))
                if name == split:
                    yield batch
        found = _named(undivided.hexdigest())
    else:
        digest = hashlib.sha256()
        for batch in _batches(store, uri, manifest, split):
            digest.update(identities(completed(batch)))
            yield batch
        found = id_of({**manifest.about.get("splits", {}), split: digest.hexdigest()})
    if found != key.rpartition("/")[2]:
        raise IntegrityError(
            f"{uri} has other records in {split}/, or beside it, than its id was made of, which would be {found}: "
            "somebody has written others there; remove that folder, and prepare the data anew"
        )


def _splits(paths: Iterable[str]) -> list[SplitName]:
    folders_of = {path.partition("/")[0] for path in paths}
    return [name for name in get_args(SplitName) if name in folders_of]


def _batches(store: Store, uri: str, manifest: folders.Manifest, split: SplitName) -> Iterator[pa.RecordBatch]:
    """The batches of the split's files, each verified against the manifest before it is opened."""
    read = 0
    paths = sorted(path for path in manifest.files if path.startswith(f"{split}/"))
    with tempfile.TemporaryDirectory(prefix="fineloop-dataset-") as scratch:
        for path in paths:
            local_path = Path(scratch, "part.parquet")
            store.download(f"{store.key(uri).rstrip('/')}/{path}", local_path)
            digest = folders.digest_of(local_path)
            if digest != manifest.files[path]:
                raise IntegrityError(f"{uri}/{path} is {digest}, its manifest says {manifest.files[path]}")
            for batch in pq.ParquetFile(local_path).iter_batches(RECORDS_AT_ONCE):
                read += batch.num_rows
                yield batch
    expected = manifest.about.get(f"{split}_records", read)
    if read != expected:
        raise IntegrityError(f"{uri} has {read} records in {split}/, its manifest says {expected}")


def id_of(splits: Mapping[str, str]) -> str:
    """The id of the dataset whose splits have these hashes: sha256, in hex, of all their records' identities."""
    return _named(hashlib.sha256(encode_json({"format": FORMAT, "splits": splits})).hexdigest())


def _named(digest: str) -> str:
    return f"d{digest[:15]}"


def groups_of(records: Sequence[Record]) -> list[str]:
    """The group that each record counts in: its own where it stands for itself; empty texts where none has a group."""
    has_groups = any(record.group for record in records)
    return [record.group or record.id for record in records] if has_groups else [""] * len(records)


def record_of(row: Mapping[str, Any]) -> Record:
    """The record that a row of a dataset's files holds."""
    turns = [Message(turn["role"], turn["content"], turn.get("more", "")) for turn in row["prompt"]]
    return Record(row["id"], turns, row["answer"], *(row.get(name, "") for name in WHERE_ANY))


def records_of(batch: pa.RecordBatch) -> list[Record]:
    """The records of a batch of a dataset's files: as `record_of` gives each, in half the time."""
    turns = batch["prompt"].flatten()
    fields = [turns.field(field.name).to_pylist() for field in turns.type]
    messages = [Message(*values) for values in zip(*fields, strict=True)]
    offsets = _offsets(batch["prompt"]).to_pylist()
    prompts = [messages[start:end] for start, end in pairwise(offsets)]
    columns = [batch[name].to_pylist() if name in batch.schema.names else repeat("") for name in WHERE_ANY]
    return [*map(Record, batch["id"].to_pylist(), prompts, batch["answer"].to_pylist(), *columns)]


# Records as Arrow batches, and each record's identity as a line of JSON; pure.

NOT_ALWAYS = frozenset({*WHERE_ANY, "more"})
"""The optional columns, and the optional field of a turn: a dataset has them only if any of its records needs them."""


def batch_of(records: Sequence[Record], *, ids: Sequence[str] | None = None) -> pa.RecordBatch:
    """A batch with all columns of these records; with `ids` instead of their own."""
    turns = [turn for record in records for turn in record.prompt]
    offsets = [0]
    for record in records:
        offsets.append(offsets[-1] + len(record.prompt))
    messages = pa.StructArray.from_arrays(
        [pa.array([turn[place] for turn in turns], pa.string()) for place in range(len(Message._fields))],
        names=Message._fields,
    )
    names = pa.array([record.id for record in records] if ids is None else ids, pa.string())
    texts = {
        name: pa.array([getattr(record, name) for record in records], pa.string()) for name in ("answer", *WHERE_ANY)
    }
    prompt = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages)
    return pa.record_batch({"id": names, "prompt": prompt, **texts})


def keyed_batch(records: pa.RecordBatch, hashes: Hashes, named: Sequence[bool]) -> pa.RecordBatch:
    """The batch with columns put in front: `named` (whether the row gave the id) and the hashes."""

    def column(values: Sequence[bytes]) -> pa.Array:
        buffers = [None, pa.py_buffer(b"".join(values))]
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(values), buffers)

    return pa.record_batch({
        "named": pa.array(named, pa.bool_()),
        **{name: column(values) for name, values in hashes._asdict().items()},
        **dict(zip(records.schema.names, records.columns, strict=True)),
    })  # fmt: skip


def present(batch: pa.RecordBatch) -> set[str]:
    """The names in NOT_ALWAYS that any record of the batch needs."""
    names = {name for name in WHERE_ANY if pc.any(pc.not_equal(batch[name], "")).as_py()}
    return names | ({"more"} if pc.any(pc.not_equal(batch["prompt"].flatten().field("more"), "")).as_py() else set())


def with_columns(batch: pa.RecordBatch, names: Set[str]) -> pa.RecordBatch:
    """The batch without the optional columns (NOT_ALWAYS) that are not in `names`."""
    columns = {name: batch[name] for name in ("id", "prompt", "answer", *(name for name in WHERE_ANY if name in names))}
    prompt, fields = columns["prompt"], [name for name in Message._fields if name != "more" or name in names]
    turns = prompt.flatten()
    offsets = _offsets(prompt)
    columns["prompt"] = pa.ListArray.from_arrays(
        offsets, pa.StructArray.from_arrays([turns.field(name) for name in fields], names=fields)
    )
    return pa.record_batch(columns)


def completed(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with the optional columns (NOT_ALWAYS) that it lacks, empty: what `with_columns` left out."""
    prompt = batch["prompt"]
    turns = prompt.flatten()
    nothing_more = pa.repeat("", len(turns))
    has_more = turns.type.get_field_index("more") >= 0
    messages = [turns.field("role"), turns.field("content"), turns.field("more") if has_more else nothing_more]
    columns = {name: batch[name] for name in ("id", "prompt", "answer")}
    columns["prompt"] = pa.ListArray.from_arrays(
        _offsets(prompt), pa.StructArray.from_arrays(messages, names=Message._fields)
    )
    nothing = pa.repeat("", len(batch))
    columns |= {name: batch[name] if name in batch.schema.names else nothing for name in WHERE_ANY}
    return pa.record_batch(columns)


def sizes(batch: pa.RecordBatch) -> pa.Array:
    """The bytes of each record's prompt and answer together, as int64."""
    prompt = batch["prompt"]
    ends = pc.cumulative_sum(pc.cast(pc.binary_length(prompt.flatten().field("content")), pa.int64()))
    before = pa.concat_arrays([pa.array([0], pa.int64()), ends])
    offsets = _offsets(prompt)
    of_prompts = pc.subtract(before.take(offsets[1:]), before.take(offsets[:-1]))
    return pc.add(of_prompts, pc.cast(pc.binary_length(batch["answer"]), pa.int64()))


def prompt_texts(batch: pa.RecordBatch) -> list[str]:
    """The text of each record's prompt: the contents of its turns, without the system's, joined by newlines."""
    turns = batch["prompt"].flatten()
    kept = pc.not_equal(turns.field("role"), "system")
    before = pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(pc.cast(kept, pa.int32()))])
    contents = pa.ListArray.from_arrays(before.take(_offsets(batch["prompt"])), turns.field("content").filter(kept))
    texts: list[str] = pc.binary_join(contents, "\n").to_pylist()
    return texts


def identities(batch: pa.RecordBatch) -> memoryview:
    """Each record's identity as a line of JSON: id, prompt and answer, then calls, tools, group and what a log says of
    it where it has any of them. A record without them has the same identity as in releases that did not know them.
    Raises IntegrityError: a text is missing, or of another type, so that no line can stand for the record."""
    prompt = batch["prompt"]
    turns = prompt.flatten()
    more = turns.field("more")
    role, content = (_quoted(turns.field(name)) for name in ("role", "content"))
    of_turns = _joined("[", role, ", ", content, _where(pc.not_equal(more, ""), ", ", _quoted(more)), "]")
    prompts = pc.binary_join(pa.ListArray.from_arrays(_offsets(prompt), of_turns), ", ")
    is_logged = pc.not_equal(batch["origin"], "")
    has_group = pc.or_(is_logged, pc.not_equal(batch["group"], ""))
    has_any = pc.or_(has_group, pc.or_(pc.not_equal(batch["calls"], ""), pc.not_equal(batch["tools"], "")))
    tools = _where(has_any, ", ", _quoted(batch["calls"]), ", ", _quoted(batch["tools"]))
    group = _where(has_group, ", ", _quoted(batch["group"]))
    of_log = [piece for name in OF_LOG if name != "drawn" for piece in (", ", _quoted(batch[name]))]
    of_log.append(_where(pc.not_equal(batch["drawn"], ""), ", ", _quoted(batch["drawn"])))
    names, answers = _quoted(batch["id"]), _quoted(batch["answer"])
    lines = _joined("[", names, ", [", prompts, "], ", answers, tools, group, _where(is_logged, *of_log), "]\n")
    if lines.null_count or lines.type != pa.string():
        raise IntegrityError("records lack a text that each has, or hold texts of another type")
    offsets = memoryview(lines.buffers()[1]).cast("i")
    first, last = offsets[lines.offset], offsets[lines.offset + len(lines)]
    return memoryview(lines.buffers()[2] or b"")[first:last]


def _quoted(texts: pa.Array) -> pa.Array:
    """Each text as a JSON string, as Python's `json.dumps` writes it without `ensure_ascii`."""
    plain = _joined('"', texts, '"')
    is_escaped = pc.match_substring_regex(texts, r'["\\\x00-\x1f]')
    escaped = [*map(encode_basestring, texts.filter(is_escaped).to_pylist())]
    return pc.replace_with_mask(plain, is_escaped, pa.array(escaped, pa.string())) if escaped else plain


def _where(mask: pa.Array, *pieces: pa.Array | str) -> pa.Array:
    """The pieces joined; an empty text where the mask is false."""
    return pc.if_else(mask, _joined(*pieces), "")


def _joined(*pieces: pa.Array | str) -> pa.Array:
    return pc.binary_join_element_wise(*pieces, "")


def _offsets(lists: pa.ListArray) -> pa.Array:
    """The start of each list in the result of `flatten`, and the end of the last one."""
    return pc.subtract(lists.offsets, lists.offsets[0])


MOST_RECORDS, MOST_BYTES = 2**17, 2**28
"""Bounds on one part: its records, and bytes of prompts and answers. It ends with the record that reaches either."""
_GROUP_BYTES = 2**25
"""Approximate bytes of a row group, which a writer buffers."""


@dataclass(frozen=True)
class Part:
    """A split as local files, in order."""

    paths: tuple[Path, ...]
    name: SplitName
    records: int
    sha256: str
    """Of the identities of its records in order, in hex, however they are divided into files."""

    def __len__(self) -> int:
        return self.records

    def __iter__(self) -> Iterator[Record]:
        for path in self.paths:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(RECORDS_AT_ONCE, use_threads=False):
                    yield from map(record_of, batch.to_pylist())

    def head(self, count: int) -> list[Record]:
        return list(islice(self, count))


@dataclass(frozen=True)
class Parts:
    """A dataset's records as local files."""

    dataset_id: str
    """`d` and 15 hex digits of a hash over the splits' hashes."""
    train: Part
    evaluation: Part
    replay: Part | None = None
    """Earlier records that production is to answer; None where the dataset has no such split."""

    @property
    def splits(self) -> list[Part]:
        return [self.train, self.evaluation, *([self.replay] if self.replay else [])]


def write_splits(
    folder: Path,
    train: Iterable[pa.RecordBatch],
    evaluation: Iterable[pa.RecordBatch],
    replay: Iterable[pa.RecordBatch] | None = None,
    *,
    columns: Set[str] = NOT_ALWAYS,
) -> Parts:
    """Write the splits below the folder; `columns` are the optional columns (NOT_ALWAYS) to write.

    Where a part ends depends on the records alone. Each split has one part at least.
    """
    sides: dict[SplitName, Iterable[pa.RecordBatch] | None] = {"train": train, "eval": evaluation, "replay": replay}
    splits = [_write(folder, name, batches, columns) for name, batches in sides.items() if batches is not None]
    return Parts(id_of({split.name: split.sha256 for split in splits}), *splits)


def _write(folder: Path, name: SplitName, batches: Iterable[pa.RecordBatch], columns: Set[str]) -> Part:
    """Write a split, one part after the other, of batches that have all columns."""
    Path(folder, name).mkdir(parents=True)
    paths, records, schema = list[Path](), 0, with_columns(batch_of([]), columns).schema
    digest = hashlib.sha256()

    def hashed(batch: pa.RecordBatch) -> pa.RecordBatch:
        digest.update(identities(batch))
        return batch

    for part, pieces in groupby(_cut(map(hashed, batches)), key=itemgetter(0)):
        paths.append(Path(folder, name, f"part-{part:05}.parquet"))
        written = (with_columns(piece, columns) for _, piece in pieces)
        with pq.ParquetWriter(paths[-1], schema, compression="zstd") as writer:
            for group in in_batches(written, lambda batch: batch.nbytes, most_size=_GROUP_BYTES):
                records += sum(map(len, group))
                writer.write_table(pa.Table.from_batches(group).combine_chunks())
    return Part(tuple(paths), name, records, digest.hexdigest())


def _cut(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batches, cut where a part ends, each piece with its part's number; an empty piece where there are none."""
    part = records = size = 0
    for batch in batches:
        while len(batch):
            ends = size + np.cumsum(sizes(batch).to_numpy(zero_copy_only=False))
            room = min(MOST_RECORDS - records, int(np.searchsorted(ends, MOST_BYTES)) + 1, len(batch))
            yield part, batch.slice(0, room)
            records, size, batch = records + room, int(ends[room - 1]), batch.slice(room)
            if records >= MOST_RECORDS or size >= MOST_BYTES:
                part, records, size = part + 1, 0, 0
    if not part and not records:
        yield part, batch_of([])


@dataclass(frozen=True)
class DatasetFolder:
    """A dataset's folder in the store."""

    dataset_id: str
    uri: str
    created: bool
    """False when the store already held it."""
    manifest_sha256: str


def publish_dataset(
    store: Store, parts: Parts, *, rejects: Path, rejected: int, profile: Mapping[str, Any]
) -> DatasetFolder:
    """Write the dataset's folder, or nothing when the store holds these records already. `rejected` is the number of
    rows that `rejects` lists.

    The profile and the rejects beside some records are those of the first run that publishes them. If two runs publish
    at once, profile and rejects may come from different ones. Raises IntegrityError: the folder of that name holds
    other records.
    """
    key = f"datasets/{parts.dataset_id}"
    manifest = folders.find_manifest(store, key)
    created = manifest is None
    if manifest is None:
        files: dict[str, bytes | Path] = {
            **{f"{split.name}/{path.name}": path for split in parts.splits for path in split.paths},
            REJECTS: rejects,
            "profile.json": json.dumps(profile, ensure_ascii=False, indent=2).encode(),
        }
        about = {
            "kind": "dataset",
            "format": FORMAT,
            "dataset_id": parts.dataset_id,
            "splits": {split.name: split.sha256 for split in parts.splits},
            **{f"{split.name}_records": len(split) for split in parts.splits},
            "rejected": rejected,
        }
        try:
            manifest = folders.publish(store, key, files, about=about, identity=(), apart=[TOKENS])
        except Conflict:
            # Another run published the same records meanwhile, with a profile of its own: either will do.
            created = False
            manifest = folders.read_manifest(store, key)
    written = {f"{split.name}/{path.name}": folders.digest_of(path) for split in parts.splits for path in split.paths}
    stored = {path: digest for path, digest in manifest.files.items() if "/" in path}
    if stored != written:  # another release may write the same records as other bytes
        require_promised(store, store.uri(key))
    return DatasetFolder(parts.dataset_id, store.uri(key), created, manifest.sha256)


# Which datasets hold a record, which versions were trained on one of them, and which runs keep its text.

logger = logging.getLogger(__name__)

Place = Literal["train", "eval", "replay", "rejects"]


@dataclass(frozen=True)
class Holder:
    """A dataset that holds some of the records."""

    dataset_id: str
    uri: str
    parts: tuple[Place, ...]
    """`rejects` keeps the raw text of a row that was never trained on."""
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Exposed:
    """A version whose weights come from a dataset that holds some of the records."""

    name: str
    version: str
    uri: str
    aliases: tuple[str, ...]
    dataset_id: str
    """The dataset that it was trained on; empty where only an ancestor was trained on one, or it is unknown."""
    why: Literal["dataset", "parent", "unknown"]
    """`unknown` where its lineage cannot be read."""
    revoked: bool


@dataclass(frozen=True)
class Exposure:
    """The datasets, versions and runs that saw the records."""

    datasets: tuple[Holder, ...]
    versions: tuple[Exposed, ...]
    runs: tuple[str, ...]
    """Ids of runs whose evaluated records hold the text of any of them."""
    unread: tuple[str, ...]
    """URIs of files that cannot be read, or have no ids: whether they hold any of the records is unknown."""


def exposure_of(store: Store, record_ids: Collection[str], *, people: Mapping[str, str] | None = None) -> Exposure:
    """Search the whole registry. Only the ids are read from Parquet files, and only the text from rejected rows.

    `people` are users whose records are searched too: the hash of each by his name in the logs.
    """
    files = [info for info in store.list(DATASETS) if info.key.endswith(".parquet")]
    if people:
        hashes = frozenset(people.values())
        theirs = [_held(store, info, (), hashes) or set() for info in files if not info.key.endswith(f"/{REJECTS}")]
        record_ids = {*record_ids, *people}.union(*theirs)  # rejected rows have the names themselves
    compared = [info for folder in (RUNS, runs.EVALUATIONS) for info in store.list(folder)]
    files += [info for info in compared if info.key.endswith(f"/{runs.EVALUATION_RECORDS}")]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        ids_in = dict(zip(files, pool.map(lambda info: _held(store, info, record_ids), files), strict=True))
    holders = _holders(store, {info: ids for info, ids in ids_in.items() if ids and info.key.startswith(DATASETS)})
    trained_on = {holder.dataset_id for holder in holders if {"train", "eval"} & set(holder.parts)}
    return Exposure(
        tuple(holders),
        tuple(_exposed(store, trained_on)),
        tuple(
            sorted(info.key.split("/")[1] for info, ids in ids_in.items() if ids and not info.key.startswith(DATASETS))
        ),
        tuple(store.uri(info.key) for info, ids in ids_in.items() if ids is None),
    )


def _holders(store: Store, ids_in: dict[ObjectInfo, set[str]]) -> list[Holder]:
    parts: dict[str, set[Place]] = defaultdict(set)
    ids: dict[str, set[str]] = defaultdict(set)
    for info, record_ids in ids_in.items():
        dataset, _, path = info.key.removeprefix(DATASETS).partition("/")
        parts[dataset].add("rejects" if path == REJECTS else cast(SplitName, path.partition("/")[0]))
        ids[dataset] |= record_ids
    return [
        Holder(name, store.uri(f"{DATASETS}{name}"), tuple(sorted(parts[name])), tuple(sorted(ids[name])))
        for name in sorted(parts)
    ]


def _exposed(store: Store, datasets: Collection[str]) -> Iterable[Exposed]:
    """The versions that were trained on one of the datasets, their descendants, and those of unknown lineage."""
    made_of: dict[tuple[str, str], Sequence[Ancestor]] = {}
    unknown: set[tuple[str, str]] = set()
    for name in versions.list_adapters(store):
        lineages = versions.made_from(store, name)
        made_of |= {(name, version): ancestors for version, ancestors in lineages.items()}
        unknown |= {(name, version) for version in versions.version_ids(store, name) if version not in lineages}
    why: dict[tuple[str, str], tuple[Literal["dataset", "parent", "unknown"], str]] = {}
    for key, ancestors in made_of.items():
        if own := next((part.name for part in ancestors if part.kind == "dataset" and part.name in datasets), ""):
            why[key] = ("dataset", own)
    if datasets:
        why |= {key: ("unknown", "") for key in unknown}
    uris = set[str]()
    while len(uris) < len(why):
        uris = {store.uri(version_key(*key)) for key in why}
        for key, ancestors in made_of.items():
            if key not in why and any(ancestor.kind == "parent" and ancestor.name in uris for ancestor in ancestors):
                why[key] = ("parent", "")
    pointers = {name: list_aliases(store, name) for name, _ in why}
    for (name, version), (reason, dataset) in sorted(why.items()):
        aliases = tuple(pointer.alias for pointer in pointers[name] if pointer.version == version)
        revoked = False
        with contextlib.suppress(ObjectMissing):  # its publication has not ended
            revoked = bool(store.trusted_keys) and signing.is_revoked(store, name, version)
        yield Exposed(name, version, store.uri(version_key(name, version)), aliases, dataset, reason, revoked)


def _held(
    store: Store, info: ObjectInfo, record_ids: Collection[str], people: Set[str] = frozenset()
) -> set[str] | None:
    """The given ids that the file's column `id` holds, and those of records with words of these people, or the ids that
    the text of rejected rows holds; None where it cannot be read."""
    column, ids = "row" if info.key.endswith(f"/{REJECTS}") else "id", set[str]()
    try:
        with pq.ParquetFile(ObjectFile(store, info.key, info.size)) as file:
            for batch in file.iter_batches(columns=[column, *OF_PEOPLE], use_threads=False):
                values = batch[column].to_pylist()
                if column == "id":
                    ids.update(set(record_ids).intersection(values))
                    for name in people and {*OF_PEOPLE}.intersection(batch.schema.names):
                        who = batch[name].to_pylist()
                        ids.update(record_id for record_id, person in zip(values, who, strict=True) if person in people)
                else:
                    ids.update(name for row in values for name in record_ids if name in row and _names(row, name))
    except ObjectMissing:  # deleted since the listing
        return set()
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as exc:
        logger.warning("%s cannot be read: %s", store.uri(info.key), exc)
        return None
    return ids


def _names(row: str, record_id: str) -> bool:
    """Whether a value of the row is this id, or a word of it where it is not a JSON object."""
    try:
        values = [*json.loads(row).values()]
    except (ValueError, AttributeError, RecursionError):
        return re.search(rf"(?<!\w){re.escape(record_id)}(?!\w)", row) is not None
    for value in values:  # grows by what lies within them
        values.extend(value.values() if isinstance(value, dict) else ())
    return any(str(value) == record_id for value in values if isinstance(value, str | int))
