"""Measuring base, champion and candidate on the same records: their files, the tokenized records, and their scores."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.records.steps import Role
from components.registry.versions import pull_version
from components.shared.errors import DataError
from components.shared.protocol import say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import build, own_base
from ray_jobs.base import base_model, precision
from ray_jobs.base.base_model import Base
from ray_jobs.kernels import door
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.scoring import STEP, marks
from ray_jobs.scoring.answers import USUAL_NEW_TOKENS, Score, longest_answer
from ray_jobs.scoring.contender import Contender
from ray_jobs.scoring.held_base import HeldBase
from ray_jobs.scoring.probe import NO_PROBES, Findings, Probes, Subject, run_all
from ray_jobs.text import chat_format
from ray_jobs.text.batching import TokenizedSplit, tokenize
from ray_jobs.text.chat_format import ChatFormat

if TYPE_CHECKING:
    import torch

PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True)
class ShardResult:
    """Scores of the records that fit every contender's context, in order."""

    tokens: dict[str, int]
    """Number of answer tokens by record id, in the candidate's tokenizer: the divisor of every contender's loss."""
    scores: dict[Role, list[Score]]
    shares: list[dict[str, Findings]]
    """The probes' findings by the probes' keys: one for each worker, in the order in which items were dealt out."""
    first_scored_at: str = field(compare=False)
    """Time at which the first batch was scored, ISO 8601 in UTC."""


@dataclass(frozen=True)
class LocalContender:
    """One contender with its files on this machine, and the records as its tokens."""

    role: Role
    config: RunConfig
    base: Base
    """Its base; for an adapter the one that it was trained on."""
    adapter: Path | None
    """Folder of the adapter; None for the base alone."""
    chat: ChatFormat
    split: TokenizedSplit
    alike: frozenset[str] = frozenset()

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of its base on this worker."""
        return _dtype(self.config)

    def load_base(
        self,
        kernels: Kernels,
        *,
        in_host_memory: bool = False,
        load: Callable[..., Any] = door.load_model,
    ) -> Any:
        """Load the base with `load`, which takes the arguments of `door.load_model`."""
        config = self.config
        return load(
            self.base,
            config.model,
            config.method.row.base,
            kernels,
            use_gpu=config.ray.use_gpu,
            in_host_memory=in_host_memory,
            dtype=self.dtype,
        )

    def scores(self, model: Any, records: Sequence[Record], rows: Sequence[int], progress: "Progress") -> list[Score]:
        """Score the records at `rows` with `model`, which has this contender's adapter on it, if there is one."""
        from ray_jobs.scoring.scoring import other_prompts, score

        others = other_prompts(self.split, self.config.model.max_length) if self.adapter else None
        return score(
            model.eval(),
            self.chat,
            [records[row] for row in rows],
            self.split.take(rows),
            with_other_prompts=others.take(rows) if others else None,
            marks=marks.named(self.config.metrics, self.alike),
            batch_size=self.config.evaluate.batch_size,
            max_new_tokens=self.config.evaluate.max_new_tokens or USUAL_NEW_TOKENS,
            advance=progress.advance,
        )

    def subject(self, model: Any) -> Subject:
        """The model as the subject of a probe."""
        return Subject(self.role, model.eval(), self.chat, self.config.evaluate.batch_size)


@contextmanager
def local_contenders(
    contenders: Sequence[Contender], records: Sequence[Record]
) -> Iterator[tuple[list[Record], list[LocalContender]]]:
    """Yield the records that fit every contender's context, and the contenders; their adapters are deleted afterwards.

    Raises:
        DataError: no record fits.
    """
    with tempfile.TemporaryDirectory(prefix="fineloop-adapters-") as scratch:
        found = [_local(contender, records, Path(scratch) / contender.role) for contender in contenders]
        fitting = set.intersection(*(set(each.split.ids) for each in found))
        kept = [record for record in records if record.id in fitting]
        if not kept:
            limit = contenders[-1].config.model.max_length
            raise DataError(f"no held-out record fits model.max_length {limit}: raise it")
        yield kept, [_only(each, fitting) for each in found]


def measure_shard(
    contenders: Sequence[Contender],
    records: Sequence[Record],
    probes: Probes = NO_PROBES,
    *,
    shard_index: int,
    kernels: Kernels = PLAIN,
    held: HeldBase | None = None,
) -> ShardResult:
    """Measure every contender on some records and with some probes, one after the other; runs as a Ray task.

    `held` is a base that this process already holds: contenders on it need not load it.

    Raises:
        DataError: no record fits the context.
    """
    import torch

    entry.quiet_libraries()
    candidate = contenders[-1].config
    if not candidate.ray.use_gpu:
        torch.set_num_threads(candidate.ray.cpus_per_worker)
    with local_contenders(contenders, records) as (kept, local):
        progress = Progress(2 * len(kept) * len(contenders), prints=shard_index == 0)
        held, seen = held or HeldBase(), 0
        scores: dict[Role, list[Score]] = {}
        found: dict[str, Findings] = {key: {} for key in probes}
        for each in local:
            base = each.load_base(kernels, load=held.load)
            if held.num_loaded != seen:
                kernels.hold_dense_if_room(base, sharers=candidate.ray.max_workers)
                seen = held.num_loaded
            progress.role = each.role
            model = kernels.adopt(build.load(base, each.adapter)) if each.adapter else base
            try:
                scores[each.role] = each.scores(model, kept, range(len(kept)), progress)
                run_all(probes, each.subject(model), found)
            finally:
                if each.adapter:
                    model.unload()  # removes the adapter from the base
            del base, model  # another base may need the memory
        return ShardResult(answer_tokens(local), scores, [found], progress.first_scored_at)


def answer_tokens(local: Sequence[LocalContender]) -> dict[str, int]:
    """Number of answer tokens by record id, in the candidate's tokenizer."""
    split = local[-1].split
    return dict(zip(split.ids, split.num_answer_tokens.tolist(), strict=True))


def _local(contender: Contender, records: Sequence[Record], folder: Path) -> LocalContender:
    config, store, adapter = contender.config, Store.open(contender.config.registry), None
    base = base_model.resolve(config.model, recorded=contender.base_identity, registry=store)
    if contender.version is not None:
        adapter = folder
        base = own_base.find(config, base, store, sha256=contender.stands_on_sha256)
        pull_version(store, contender.version, folder, published_sha256=contender.published_sha256)
    chat = chat_format.load(base, config.model, adapter)
    # Tokens that lie beside the dataset are not read: whoever wrote them would decide what the gate measures.
    split = tokenize(records, chat, config.model.max_length)
    return LocalContender(contender.role, config, base, adapter, chat, split, contender.alike)


def _dtype(config: RunConfig) -> "torch.dtype":
    return precision.dtype_here(config.train.dtype, use_gpu=config.ray.use_gpu)


def with_room_for_answers(config: RunConfig, split: TokenizedSplit) -> RunConfig:
    """The config with `evaluate.max_new_tokens` set: enough for every reference answer, and no more."""
    longest = longest_answer(split.num_answer_tokens)
    if longest > USUAL_NEW_TOKENS:
        say(STEP, f"answers may be {longest} tokens long, as the longest reference is (evaluate.max_new_tokens)")
    settled = config.evaluate.model_copy(update={"max_new_tokens": longest})
    return config.model_copy(update={"evaluate": settled})


def _only(contender: LocalContender, ids: set[str]) -> LocalContender:
    return replace(
        contender,
        split=contender.split.take([row for row, name in enumerate(contender.split.ids) if name in ids]),
    )


class Progress:
    """Progress of a worker's measurements; only one worker prints it."""

    def __init__(self, total: int, *, prints: bool) -> None:
        self.role = ""
        self.first_scored_at = ""
        self._prints = prints
        self._total = total
        self._done = 0
        self._said_at = 0.0

    def advance(self, count: int) -> None:
        """Add the `count` items of a finished batch."""
        self._done += count
        self.first_scored_at = self.first_scored_at or datetime.now(UTC).isoformat(timespec="microseconds")
        now = time.monotonic()
        if self._prints and now - self._said_at >= PROGRESS_EVERY_S:
            self._said_at = now
            say(STEP, f"{self.role}: {self._done / self._total:.0%} of all answers")
