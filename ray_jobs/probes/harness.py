"""Tasks of lm-evaluation-harness, where that is installed: what a model can do outside its domain.

A task defines its own prompt and number of few-shot examples. The chat template is applied to Fineloop's own tasks, in
`tasks/`, and to no others, which is lm-eval's default. Each model is measured by one worker, while it is in memory
anyway: tasks are not divided among workers.
"""

import contextlib
import copy
import hashlib
import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from components.config.schema import EvaluateConfig, RunConfig
from components.records.steps import ROLES, Evaluation, HarnessScores, Role, TaskScore
from components.shared.errors import ConfigError, JobError
from components.shared.machine import available_bytes
from components.store.store import Store
from ray_jobs.scoring.measure import (
    Contender,
    Findings,
    Outcome,
    Rows,
    Subject,
    earlier_measurements,
    on_the_first_base,
)
from ray_jobs.text.chat_format import SWITCHES, ChatFormat

TASKS, OURS = Path(__file__).with_name("tasks"), "fineloop_"
"""The folder of Fineloop's own tasks, and what their names begin with."""
SEED = 1234
"""Seed of everything that a task samples, such as its few-shot examples."""
BOOTSTRAPS = 1000
"""Number of bootstrap resamples for the standard error of metrics that are no means; 0 would give no errors at all."""
USUAL_TOKENS = 2048
"""Approximate length of the longest text of a usual task, with its few-shot examples."""
BYTES_PER_LOGIT, MEMORY_SHARE = 12, 0.5
"""Bytes per logit, since lm-eval computes log-probabilities in float32 beside the logits, and the share of the free
memory that they may take."""


@dataclass(frozen=True)
class Tasks:
    """The tasks to run, and the roles to run them on."""

    include: str
    roles: frozenset[Role]
    record: HarnessScores
    """The tasks, and the scores that earlier runs measured."""

    def at(self, rows: Rows) -> "Tasks":
        """A worker's share: all tasks count as one item, so one worker gets all, and the others none."""
        return self if len(rows(1)) else replace(self, roles=frozenset())

    def held_together(self) -> "Tasks":
        """The tasks for workers that shard the base: they are left out, except for scores of earlier runs."""
        left_out = "as its workers hold the base together" if self.roles else ""
        return replace(self, roles=frozenset(), record=self.record.model_copy(update={"left_out": left_out}))

    def run(self, subject: Subject, findings: Findings) -> tuple[TaskScore, ...] | None:
        """Measure a model's scores; None where an earlier run has."""
        return run(self, subject.model, subject.chat, subject.batch_size) if subject.role in self.roles else None

    def outcome(self, shares: Sequence[Findings], chat: ChatFormat) -> Outcome:
        if not self.record.tasks:
            return Outcome(None)
        scores: dict[Any, tuple[TaskScore, ...]] = {**self.record.scores}
        for share in shares:
            scores.update(share)
        record = self.record.model_copy(update={"scores": {role: scores[role] for role in ROLES if role in scores}})
        return Outcome(record, lines=record.summary)


NO_TASKS = Tasks("", frozenset(), HarnessScores(lm_eval="", tasks=()))


def check(config: RunConfig) -> None:
    """Check that the tasks of the config can be found here. Raises ConfigError: lm-eval is not installed, does not know
    a task, or the folder evaluate.lm_eval_include is missing."""
    evaluate: EvaluateConfig = config.evaluate
    if not evaluate.lm_eval:
        return
    tasks = _manager(evaluate.lm_eval_include).all_tasks
    if unknown := [name for name in evaluate.lm_eval if name not in tasks]:
        raise ConfigError(
            f"evaluate.lm_eval: lm-eval {metadata.version('lm_eval')} knows no task {', '.join(unknown)}: "
            "`lm-eval ls tasks` lists those that it ships; the folder of your own goes into evaluate.lm_eval_include"
        )


def prepare(store: Store, chat: ChatFormat, config: RunConfig, contenders: Sequence[Contender]) -> Tasks:
    """The tasks for the contenders that no earlier run has measured on them. Raises ConfigError: as `check`."""
    check(config)
    evaluate = config.evaluate
    if not evaluate.lm_eval:
        return NO_TASKS
    folders = [TASKS] if any(name.startswith(OURS) for name in evaluate.lm_eval) else []
    if evaluate.lm_eval_include:
        folders.append(Path(evaluate.lm_eval_include))
    record = HarnessScores(
        lm_eval=metadata.version("lm_eval"),
        tasks=tuple(dict.fromkeys(evaluate.lm_eval)),
        limit=evaluate.lm_eval_limit,
        include_sha256=_sha256(folders) if folders else "",
        base_format=config.method.row.base,
    )

    def scores_of(before: Evaluation) -> tuple[str, Mapping[str, tuple[TaskScore, ...]]] | None:
        same = before.harness is not None and before.harness.same_tasks(record)
        return (before.harness.base_format, before.harness.scores) if before.harness and same else None

    scores = earlier_measurements(store, config, contenders, scores_of)
    ours = {contender.role for contender in on_the_first_base(contenders) if contender.role in ROLES}
    return Tasks(
        evaluate.lm_eval_include, frozenset(ours - scores.keys()), record.model_copy(update={"scores": scores})
    )


def run(tasks: Tasks, model: Any, chat: ChatFormat, batch_size: int) -> tuple[TaskScore, ...]:
    """Run every task on a model in memory, with as many texts at once as `batch_size` and memory allow. Raises
    ConfigError: this worker's image lacks lm-eval, or the folder evaluate.lm_eval_include; JobError: memory does not
    hold one text."""
    import torch

    manager = _manager(tasks.include)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # A copy, as lm-eval adds a padding token to a tokenizer that has none.
    around = {"tokenizer": copy.deepcopy(chat.tokenizer), "backend": "causal", "trust_remote_code": False}
    thinking = dict.fromkeys(SWITCHES, chat.thinking)
    ours = [name for name in tasks.record.tasks if name.startswith(OURS)]
    at_once = _with_room(batch_size, model)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    while True:
        try:
            scores: list[TaskScore] = []
            for names, is_chat in ((ours, True), ([name for name in tasks.record.tasks if name not in ours], False)):
                if not names:
                    continue
                # Without its log lines and progress bars, which go to stderr; exceptions are still raised.
                with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
                    results = simple_evaluate(
                        HFLM(pretrained=model, batch_size=at_once, chat_template_args=thinking, **around),
                        tasks=names,
                        task_manager=manager,
                        limit=tasks.record.limit,
                        bootstrap_iters=BOOTSTRAPS,
                        apply_chat_template=is_chat,
                        random_seed=SEED,
                        numpy_random_seed=SEED,
                        torch_random_seed=SEED,
                        fewshot_random_seed=SEED,
                        confirm_run_unsafe_code=False,
                    )
                scores += parsed(results)
            return tuple(scores)
        except torch.OutOfMemoryError as exc:
            if at_once == 1:
                raise JobError(
                    "the device's memory does not hold one text of evaluate.lm_eval beside the model: take a GPU with "
                    "more memory, or a quantised base (method.base)"
                ) from exc
            at_once //= 2
        torch.cuda.empty_cache()  # outside the handler, whose traceback keeps references to tensors


def parsed(results: Mapping[str, Mapping[str, Any]]) -> Iterator[TaskScore]:
    """Yield the metrics of each task: lm-eval's keys are "metric,filter", and "metric_stderr,filter" for the error."""
    for task, of_task in results["results"].items():
        samples = results.get("samples", {}).get(task, [])
        higher_is_better = results.get("higher_is_better", {}).get(task, {})
        for key, value in of_task.items():
            metric, comma, name = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                marks = [sample.get(metric) for sample in samples if sample["filter"] == name]
                yield TaskScore(
                    task=task,
                    metric=metric if name == "none" else f"{metric} ({name})",
                    value=_number(value),
                    stderr=_number(of_task.get(f"{metric}_stderr,{name}")),
                    lower_is_better=higher_is_better.get(metric) is False,
                    passes=tuple(mark == 1 for mark in marks) if all(mark in (0, 1) for mark in marks) else (),
                )


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@cache
def _manager(include: str) -> Any:
    """lm-eval's manager of the tasks that it ships, of Fineloop's, and of those in the folder `include`, the later of
    which take precedence; cached, as reading them takes seconds."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate.lm_eval names tasks of lm-evaluation-harness, which is not installed here: "
            "pip install 'fineloop[eval]', here and in the image of the Ray workers, or remove evaluate.lm_eval"
        )
    if include and not Path(include).is_dir():
        raise ConfigError(f"evaluate.lm_eval_include {include} is no folder where evaluation runs")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=[str(TASKS), *([include] if include else [])])


def _with_room(batch_size: int, model: Any) -> int:
    """The largest batch size, up to `batch_size`, whose logits fit into memory; at least 1."""
    from ray_jobs.scoring.generation import free_bytes

    free = free_bytes(model.device)
    text = model.config.get_text_config()
    longest = min(USUAL_TOKENS, getattr(text, "max_position_embeddings", None) or USUAL_TOKENS)
    room = MEMORY_SHARE * (available_bytes() if free is None else free)
    return max(1, min(batch_size, int(room / (BYTES_PER_LOGIT * longest * text.vocab_size))))


def _sha256(folders: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()
