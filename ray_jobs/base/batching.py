"""From records to batches of tokens.

Shapes: N records, B records of a batch, T tokens of its longest record.

A record becomes `prompt tokens + answer tokens`, both from the base's own chat template; only the answer is labelled.
Rows are padded on the right, so a causal model needs no attention mask: no real token ever looks at padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components.prepare.dataset import Record
from ray_jobs.base.chat_format import ChatFormat

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that cross_entropy passes over
MIN_PROMPT_TOKENS = 8  # what must remain of a prompt that is cut to make room for its answer
MEGABATCH = 8  # batches that are sorted together: enough to pair like lengths, few enough to stay random


@dataclass(frozen=True)
class TokenizedSplit:
    """One split as flat arrays, which Ray's object store shares between processes without copying."""

    ids: list[str]
    tokens: npt.NDArray[np.int32]
    """All records end to end."""
    offsets: npt.NDArray[np.int64]
    """Length N + 1: record i is tokens[offsets[i]:offsets[i + 1]]."""
    num_prompt_tokens: npt.NDArray[np.int32]
    """Length N: how many tokens of each record carry no label."""
    too_long: list[str]
    """Ids of the records whose answer leaves no room for a prompt; they are not in the arrays."""
    cut: list[str]
    """Ids of the records whose prompt lost its beginning."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each record."""
        return np.diff(self.offsets)

    @property
    def num_answer_tokens(self) -> npt.NDArray[np.int64]:
        """Labelled tokens of each record."""
        return self.lengths - self.num_prompt_tokens

    def take(self, indices: Sequence[int]) -> "TokenizedSplit":
        """The records at `indices`, in that order."""
        rows = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        return TokenizedSplit(
            ids=[self.ids[i] for i in indices],
            tokens=np.concatenate(rows) if rows else self.tokens[:0],
            offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
            num_prompt_tokens=self.num_prompt_tokens[np.asarray(indices, dtype=np.int64)],
            too_long=self.too_long,
            cut=self.cut,
        )


def tokenize(records: Sequence[Record], chat: ChatFormat, max_length: int) -> TokenizedSplit:
    """Tokenise as the base's chat reads. Prompts that do not fit lose their beginning; answers are never cut.

    Raises:
        DataError: a record cannot be told in the base's chat.
    """
    texts = [chat.prompt_and_answer(record) for record in records]
    prompt_tokens = _encode(chat.tokenizer, [prompt for prompt, _ in texts])
    answer_tokens = [_ended(row, chat) for row in _following(chat.tokenizer, texts, prompt_tokens)]

    ids, rows, num_prompt_tokens, too_long, cut = [], [], [], [], []
    for record, prompt_row, answer_row in zip(records, prompt_tokens, answer_tokens, strict=True):
        room = max_length - len(answer_row)
        if room < min(MIN_PROMPT_TOKENS, len(prompt_row)):
            too_long.append(record.id)
            continue
        kept = prompt_row[-room:]
        if len(kept) < len(prompt_row):
            cut.append(record.id)
        ids.append(record.id)
        rows.append(kept + answer_row)
        num_prompt_tokens.append(len(kept))
    return TokenizedSplit(
        ids=ids,
        tokens=np.array([token for row in rows for token in row], dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        num_prompt_tokens=np.array(num_prompt_tokens, dtype=np.int32),
        too_long=too_long,
        cut=cut,
    )


def plan_epoch(
    lengths: npt.NDArray[np.int64], *, batch_size: int, group_by_length: bool, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """The batches of one epoch, each an array of record indices. Pure, so that resuming needs no state for it.

    Every record occurs once; a last short batch is filled up with records from the epoch's start, so that every batch
    can be shared out evenly. With `group_by_length`, runs of MEGABATCH shuffled batches are sorted by length, cut again
    and shuffled: like lengths meet while each batch stays a near-random sample.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    order = np.concatenate([order, np.resize(order, -len(order) % batch_size)])
    if group_by_length:
        chunks = np.array_split(order, range(batch_size * MEGABATCH, len(order), batch_size * MEGABATCH))
        order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
    batches = list(order.reshape(-1, batch_size))
    rng.shuffle(batches)
    return batches


def share(batch: npt.NDArray[np.int64], *, micro_batch_size: int, num_workers: int) -> npt.NDArray[np.int64]:
    """Deal a batch out: shape (accumulation, num_workers, micro_batch_size).

    Neighbours in length go to different workers, so that all do equal work in each round.
    """
    rounds = batch.reshape(-1, micro_batch_size, num_workers)
    return np.ascontiguousarray(rounds.transpose(0, 2, 1))


def collate(
    split: TokenizedSplit, indices: Sequence[int] | npt.NDArray[np.int64], pad: int
) -> dict[str, "torch.Tensor"]:
    """Pad records on the right. Gives `input_ids` and `labels`, both int64 of shape (B, T); labels are not shifted."""
    import torch

    width = int(max(split.lengths[i] for i in indices))
    input_ids = np.full((len(indices), width), pad, dtype=np.int64)
    labels = np.full((len(indices), width), IGNORED, dtype=np.int64)
    for row, index in enumerate(indices):
        start, end = split.offsets[index], split.offsets[index + 1]
        input_ids[row, : end - start] = split.tokens[start:end]
        answer = split.num_prompt_tokens[index]
        labels[row, answer : end - start] = split.tokens[start + answer : end]
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def by_length(lengths: npt.NDArray[np.int64], batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Indices in batches of like length, longest first, so that running out of memory happens at once or never."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # The template has written every special token that belongs there, a beginning-of-sequence token included.
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return rows


def _following(tokenizer: Any, texts: list[tuple[str, str]], before: list[list[int]]) -> list[list[int]]:
    """The tokens of each second text as it follows the first, whose tokens are given.

    Alone a text may read otherwise: a SentencePiece tokenizer begins it with a space that is not there. Only where the
    two merge over their border is it read alone, since generation will see the first one's tokens.
    """
    whole = _encode(tokenizer, [first + second for first, second in texts])
    return [
        row[len(known) :] if row[: len(known)] == known else _encode(tokenizer, [second])[0]
        for row, known, (_, second) in zip(whole, before, texts, strict=True)
    ]


def _ended(tokens: list[int], chat: ChatFormat) -> list[int]:
    """Up to and with the first stop: what a template writes after it, generation never sees."""
    stop = next((place for place, token in enumerate(tokens) if token in chat.stops), None)
    return [*tokens, chat.end_of_turn] if stop is None else tokens[: stop + 1]
