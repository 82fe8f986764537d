"""Tokenised records that are made up, token by token."""

from collections.abc import Sequence

import numpy as np

from ray_jobs.text.batching import TokenizedSplit


def split_of(*records: tuple[Sequence[int], Sequence[int]]) -> TokenizedSplit:
    """Of the tokens of each record's prompt and of its answer; the records are named "0", "1" and so on."""
    lengths = [len(prompt) + len(answer) for prompt, answer in records]
    return TokenizedSplit(
        ids=[str(row) for row in range(len(records))],
        tokens=np.concatenate([np.asarray(part, dtype=np.int32) for record in records for part in record]),
        labelled=np.concatenate([np.repeat([False, True], list(map(len, record))) for record in records]),
        offsets=np.cumsum([0, *lengths]),
        num_prompt_tokens=np.array([len(prompt) for prompt, _ in records], dtype=np.int32),
        too_long=[],
        cut=[],
    )
