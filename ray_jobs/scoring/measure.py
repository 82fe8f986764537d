"""Base, champion and candidate on the same records: who they are, how each reads the records, and what each scores."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.ray import MatmulDtype
from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.registry.harness_records import TaskScore
from components.registry.records import Role
from components.registry.store import Store
from components.registry.versions import Version, pull_version
from components.shared.errors import DataError
from components.shared.protocol import say
from ray_jobs import entry
from ray_jobs.adapters import build, own_base
from ray_jobs.adapters.held_base import HeldBase
from ray_jobs.base import base_model, chat_format, precision, widened
from ray_jobs.base.base_model import Base
from ray_jobs.base.batching import TokenizedSplit, tokenize
from ray_jobs.base.chat_format import ChatFormat
from ray_jobs.scoring import STEP, marks
from ray_jobs.scoring.answers import NEW_TOKENS, Score
from ray_jobs.scoring.harness import NO_TASKS, Tasks
from ray_jobs.scoring.suites import NO_QUESTIONS, Questions
from ray_jobs.scoring.texts import ReadShare, Texts

if TYPE_CHECKING:
    import torch

Gathered = Callable[[Sequence[int], Sequence[Any]], list[Any]]
PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True)
class Contender:
    """A model to measure: the base alone, or an adapter on the base that it was trained on."""

    role: Role
    config: RunConfig
    """The run's, with the base and the method that this model was trained with."""
    version: Version | None
    base_identity: Mapping[str, str]
    """Of the base that the adapter was trained on; of the base alone, what the candidate was."""
    published_sha256: str = ""
    """Of the manifest that this run's own training published: a trusted key signs it once the gate has let it pass."""


@dataclass(frozen=True)
class ShardResult:
    """Scores of the records that fit every contender's context, in order."""

    tokens: dict[str, int]
    """Id to the answer's tokens, as the candidate's tokenizer counts them: what every loss is divided by."""
    scores: dict[Role, list[Score]]
    texts: list[ReadShare]
    """What was found in each kind of text."""
    first_scored_at: str = field(compare=False)
    """When the first batch was done; ISO 8601, in UTC."""
    suite_answers: dict[Role, dict[str, list[str]]] = field(default_factory=dict)
    """What was said to the questions of each suite, in order; of the roles that had to be asked."""
    task_scores: dict[Role, tuple[TaskScore, ...]] = field(default_factory=dict)
    """In tasks of lm-eval; of the roles that had to run them, by the worker that had to."""


@dataclass(frozen=True)
class Asked:
    """One contender with its files on this machine, and the records as it reads them."""

    role: Role
    config: RunConfig
    base: Base
    """What it stands on: an adapter on the weights that it was trained on, the base alone on its own."""
    adapter: Path | None
    chat: ChatFormat
    split: TokenizedSplit

    @property
    def dtype(self) -> "torch.dtype":
        """What its base is in on this worker."""
        return precision.dtype_here(self.config.train.dtype, use_gpu=self.config.ray.use_gpu)

    def load_base(
        self,
        matmul_dtype: MatmulDtype,
        *,
        in_host_memory: bool = False,
        load: Callable[..., Any] = base_model.load_model,
    ) -> Any:
        """The base in memory; `load` as `base_model.load_model`."""
        config = self.config
        return load(
            self.base,
            config.model,
            config.method.row.base,
            use_gpu=config.ray.use_gpu,
            in_host_memory=in_host_memory,
            matmul_dtype=matmul_dtype,
            dtype=self.dtype,
        )

    def scores(self, model: Any, records: Sequence[Record], rows: Sequence[int], progress: "Progress") -> list[Score]:
        """Of the records at `rows`, by a model that has this contender's adapter on it, if it has one."""
        from ray_jobs.scoring.scoring import other_prompts, score

        others = other_prompts(self.split, self.config.model.max_length) if self.adapter else None
        return score(
            model.eval(),
            self.chat,
            [records[row] for row in rows],
            self.split.take(rows),
            with_other_prompts=others.take(rows) if others else None,
            marks=marks.named(self.config.metrics),
            batch_size=self.config.evaluate.batch_size,
            max_new_tokens=self.config.evaluate.max_new_tokens or NEW_TOKENS[-1],
            advance=progress.advance,
        )

    def answers(self, model: Any, prompts: TokenizedSplit, new_tokens: int) -> list[list[int]]:
        """Of the base alone, drawn at temperature 1."""
        from ray_jobs.scoring.sampling import sample

        return sample(model.eval(), self.chat, prompts, self.config.evaluate.batch_size, new_tokens)

    def text_nll(self, model: Any, texts: TokenizedSplit) -> list[float]:
        """Of texts that are no records, by the same model; in nats."""
        from ray_jobs.scoring.scoring import label_nll

        return label_nll(model.eval(), texts, self.config.evaluate.batch_size, self.chat.pad)

    def suite_answers(self, model: Any, questions: Questions) -> dict[str, list[str]]:
        """To questions outside the domain, by the same model."""
        return questions.answers(self.role, model.eval(), self.chat, self.config.evaluate.batch_size)

    def task_scores(self, model: Any, tasks: Tasks) -> tuple[TaskScore, ...] | None:
        """In tasks of lm-eval, by the same model; None where there is nothing to run."""
        return tasks.scores(self.role, model.eval(), self.chat, self.config.evaluate.batch_size)


class Reading:
    """One kind of text, read by one contender after the other, the base first, which may have to answer before.

    `rows` are this worker's; `gathered` puts in their order what all workers that read together have found.
    """

    def __init__(self, texts: Texts, rows: Sequence[int], gathered: Gathered | None = None) -> None:
        self._texts, self._rows = texts, rows
        self._gathered = gathered or (lambda _, found: list(found))
        self.found = ReadShare({})

    def by(self, asked: Asked, model: Any) -> None:
        """Have a model read them, unless that is known."""
        if asked.role == "base" and self._texts.new_tokens:
            mine = self._texts.split.take(self._rows)
            answers = self._gathered(self._rows, asked.answers(model, mine, self._texts.new_tokens))
            self.found = ReadShare({}, answers)
            self._texts = self._texts.answered(answers)
        if asked.role in self._texts.roles:
            nll = asked.text_nll(model, self._texts.split.take(self._rows))
            self.found.nll[asked.role] = self._gathered(self._rows, nll)


@contextmanager
def asking(contenders: Sequence[Contender], records: Sequence[Record]) -> Iterator[tuple[list[Record], list[Asked]]]:
    """The records that fit every contender's context, and the contenders; their adapters are gone afterwards.

    Raises:
        DataError: no record fits.
    """
    with tempfile.TemporaryDirectory(prefix="fineloop-adapters-") as scratch:
        found = [_asked(contender, records, Path(scratch) / contender.role) for contender in contenders]
        fitting = set.intersection(*(set(each.split.ids) for each in found))
        kept = [record for record in records if record.id in fitting]
        if not kept:
            limit = contenders[-1].config.model.max_length
            raise DataError(f"no held-out record fits model.max_length {limit}: raise it")
        yield kept, [_only(each, fitting) for each in found]


def measure_shard(
    contenders: Sequence[Contender],
    records: Sequence[Record],
    texts: Sequence[Texts] = (),
    questions: Questions = NO_QUESTIONS,
    tasks: Tasks = NO_TASKS,
    *,
    shard_index: int,
    matmul_dtype: MatmulDtype = "bfloat16",
    held: HeldBase | None = None,
) -> ShardResult:
    """Measure every contender on some records and texts, one after the other; runs as a Ray task.

    `held` is a base that this process holds already: whoever stands on it need not read it.

    Raises:
        DataError: no record fits the context.
    """
    import torch

    entry.quiet_libraries()
    candidate = contenders[-1].config
    if not candidate.ray.use_gpu:
        torch.set_num_threads(candidate.ray.cpus_per_worker)
    with asking(contenders, records) as (kept, all_asked):
        progress = Progress(2 * len(kept) * len(contenders), tells=shard_index == 0)
        held, seen = held or HeldBase(), 0
        scores: dict[Role, list[Score]] = {}
        reading = [Reading(each, range(len(each.split))) for each in texts]
        suite_answers: dict[Role, dict[str, list[str]]] = {}
        task_scores: dict[Role, tuple[TaskScore, ...]] = {}
        for each in all_asked:
            base = each.load_base(matmul_dtype, load=held.load)
            if held.num_loaded != seen:
                widened.widen_if_room(base, matmul_dtype, sharers=candidate.ray.num_workers)
                seen = held.num_loaded
            progress.role = each.role
            model = build.load(base, each.adapter, matmul_dtype=matmul_dtype) if each.adapter else base
            try:
                scores[each.role] = each.scores(model, kept, range(len(kept)), progress)
                for one in reading:
                    one.by(each, model)
                suite_answers[each.role] = each.suite_answers(model, questions)
                if (in_tasks := each.task_scores(model, tasks)) is not None:
                    task_scores[each.role] = in_tasks
            finally:
                if each.adapter:
                    model.unload()  # the base is as it was
            del base, model  # whose memory another base may need
        found = [one.found for one in reading]
        began = progress.first_scored_at
        return ShardResult(answer_tokens(all_asked), scores, found, began, suite_answers, task_scores)


def answer_tokens(all_asked: Sequence[Asked]) -> dict[str, int]:
    """Of each record, as the candidate counts them."""
    split = all_asked[-1].split
    return dict(zip(split.ids, split.num_answer_tokens.tolist(), strict=True))


def _asked(contender: Contender, records: Sequence[Record], folder: Path) -> Asked:
    config = contender.config
    base, adapter = base_model.resolve(config.model, recorded=contender.base_identity), None
    if contender.version is not None:
        store, adapter = Store.open(config.registry), folder
        base = own_base.find(config, base, store)
        pull_version(store, contender.version, folder, published_sha256=contender.published_sha256)
    chat = chat_format.load(base, config.model, adapter)
    split = tokenize(records, chat, config.model.max_length)
    return Asked(contender.role, config, base, adapter, chat, split)


def _only(asked: Asked, ids: set[str]) -> Asked:
    return replace(asked, split=asked.split.take([row for row, name in enumerate(asked.split.ids) if name in ids]))


class Progress:
    """How far a worker is. One tells it to a person; the others keep pace with that one."""

    def __init__(self, total: int, *, tells: bool) -> None:
        self.role = ""
        self.first_scored_at = ""
        self._tells = tells
        self._total = total
        self._done = 0
        self._said_at = 0.0

    def advance(self, count: int) -> None:
        """Count what a batch has done."""
        self._done += count
        self.first_scored_at = self.first_scored_at or datetime.now(UTC).isoformat(timespec="microseconds")
        now = time.monotonic()
        if self._tells and now - self._said_at >= PROGRESS_EVERY_S:
            self._said_at = now
            say(STEP, f"{self.role}: {self._done / self._total:.0%} of all answers")
