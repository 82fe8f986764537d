"""Records as Arrow batches: the columns of a dataset's files, and each record's identity as a line of JSON; pure."""

import json
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING

from components.prepare.dataset import WHERE_ANY, Message, Record, record_of
from components.prepare.validate import Hashes, KeyedRecord

if TYPE_CHECKING:
    import pyarrow as pa

NOT_ALWAYS = frozenset({*WHERE_ANY, "more"})
"""The optional columns, and the optional field of a turn: a dataset has them only if any of its records needs them."""
_ESCAPED = r'["\\\x00-\x1f]'
"""Pattern of a character that JSON has to escape in a text."""


def batch_of(records: Sequence[Record]) -> "pa.RecordBatch":
    """A batch with all columns of these records."""
    import pyarrow as pa

    turns = [turn for record in records for turn in record.prompt]
    offsets = [0]
    for record in records:
        offsets.append(offsets[-1] + len(record.prompt))
    messages = pa.StructArray.from_arrays(
        [pa.array([turn[place] for turn in turns], pa.string()) for place in range(len(Message._fields))],
        names=Message._fields,
    )
    texts = {
        name: pa.array([getattr(record, name) for record in records], pa.string())
        for name in ("id", "answer", *WHERE_ANY)
    }
    prompt = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages)
    return pa.record_batch({"id": texts.pop("id"), "prompt": prompt, **texts})


def keyed_batch_of(records: Sequence[KeyedRecord]) -> "pa.RecordBatch":
    """A batch with all columns of these records, preceded by `named` (whether the row gave the id) and the hashes."""
    hashes = Hashes(*([getattr(each, name) for each in records] for name in Hashes._fields))
    return keyed_batch(batch_of([each.record for each in records]), hashes, [each.named for each in records])


def keyed_batch(records: "pa.RecordBatch", hashes: Hashes, named: Sequence[bool]) -> "pa.RecordBatch":
    """The batch with columns put in front: `named` (whether the row gave the id) and the hashes."""
    import pyarrow as pa

    def column(values: Sequence[bytes]) -> pa.Array:
        buffers = [None, pa.py_buffer(b"".join(values))]
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(values), buffers)

    return pa.record_batch({
        "named": pa.array(named, pa.bool_()),
        **{name: column(values) for name, values in hashes._asdict().items()},
        **dict(zip(records.schema.names, records.columns, strict=True)),
    })  # fmt: skip


def records_of(batch: "pa.RecordBatch") -> Iterator[Record]:
    """The records of a batch, which may lack optional columns."""
    return map(record_of, batch.to_pylist())


def present(batch: "pa.RecordBatch") -> set[str]:
    """The names in NOT_ALWAYS that any record of the batch needs."""
    import pyarrow.compute as pc

    found = {name for name in WHERE_ANY if pc.any(pc.not_equal(batch[name], "")).as_py()}
    return found | ({"more"} if pc.any(pc.not_equal(batch["prompt"].flatten().field("more"), "")).as_py() else set())


def with_columns(batch: "pa.RecordBatch", names: Set[str]) -> "pa.RecordBatch":
    """The batch without the optional columns (NOT_ALWAYS) that are not in `names`."""
    import pyarrow as pa

    columns = {name: batch[name] for name in ("id", "prompt", "answer", *(each for each in WHERE_ANY if each in names))}
    prompt, fields = columns["prompt"], [name for name in Message._fields if name != "more" or name in names]
    turns = prompt.flatten()
    offsets = _offsets(prompt)
    columns["prompt"] = pa.ListArray.from_arrays(
        offsets, pa.StructArray.from_arrays([turns.field(name) for name in fields], names=fields)
    )
    return pa.record_batch(columns)


def sizes(batch: "pa.RecordBatch") -> "pa.Array":
    """The bytes of each record's prompt and answer together, as int64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    prompt = batch["prompt"]
    ends = pc.cumulative_sum(pc.cast(pc.binary_length(prompt.flatten().field("content")), pa.int64()))
    before = pa.concat_arrays([pa.array([0], pa.int64()), ends])
    offsets = _offsets(prompt)
    of_prompts = pc.subtract(before.take(offsets[1:]), before.take(offsets[:-1]))
    return pc.add(of_prompts, pc.cast(pc.binary_length(batch["answer"]), pa.int64()))


def asked(batch: "pa.RecordBatch") -> list[str]:
    """The text of each record's prompt: the contents of its turns, without the system's, joined by newlines."""
    import pyarrow as pa
    import pyarrow.compute as pc

    turns = batch["prompt"].flatten()
    kept = pc.not_equal(turns.field("role"), "system")
    before = pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(pc.cast(kept, pa.int32()))])
    contents = pa.ListArray.from_arrays(before.take(_offsets(batch["prompt"])), turns.field("content").filter(kept))
    texts: list[str] = pc.binary_join(contents, "\n").to_pylist()
    return texts


def identities(batch: "pa.RecordBatch") -> memoryview:
    """Each record's identity as a line of JSON: id, prompt and answer, then calls, tools and group where it has any of
    them. A record without them has the same identity as in releases that did not know them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    prompt = batch["prompt"]
    turns = prompt.flatten()
    more = turns.field("more")
    of_turns = _joined(
        "[",
        _quoted(turns.field("role")),
        ", ",
        _quoted(turns.field("content")),
        _where(pc.not_equal(more, ""), ", ", _quoted(more)),
        "]",
    )
    prompts = pc.binary_join(pa.ListArray.from_arrays(_offsets(prompt), of_turns), ", ")
    has_group = pc.not_equal(batch["group"], "")
    has_any = pc.or_(has_group, pc.or_(pc.not_equal(batch["calls"], ""), pc.not_equal(batch["tools"], "")))
    tools = _where(has_any, ", ", _quoted(batch["calls"]), ", ", _quoted(batch["tools"]))
    group = _where(has_group, ", ", _quoted(batch["group"]))
    lines = _joined(
        *("[", _quoted(batch["id"]), ", [", prompts, "], ", _quoted(batch["answer"]), tools, group, "]\n"),
    )
    offsets = memoryview(lines.buffers()[1]).cast("i")
    first, last = offsets[lines.offset], offsets[lines.offset + len(lines)]
    return memoryview(lines.buffers()[2] or b"")[first:last]


def _quoted(texts: "pa.Array") -> "pa.Array":
    """Each text as a JSON string, as Python's `json.dumps` writes it without `ensure_ascii`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = _joined('"', texts, '"')
    is_escaped = pc.match_substring_regex(texts, _ESCAPED)
    escaped = [json.dumps(text, ensure_ascii=False) for text in texts.filter(is_escaped).to_pylist()]
    return pc.replace_with_mask(plain, is_escaped, pa.array(escaped, pa.string())) if escaped else plain


def _where(mask: "pa.Array", *pieces: "pa.Array | str") -> "pa.Array":
    """The pieces joined; an empty text where the mask is false."""
    import pyarrow.compute as pc

    return pc.if_else(mask, _joined(*pieces), "")


def _joined(*pieces: "pa.Array | str") -> "pa.Array":
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(*pieces, "")


def _offsets(lists: "pa.ListArray") -> "pa.Array":
    """The start of each list in the result of `flatten`, and the end of the last one."""
    import pyarrow.compute as pc

    return pc.subtract(lists.offsets, lists.offsets[0])
