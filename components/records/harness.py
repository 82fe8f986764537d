"""Scores of the compared models on lm-evaluation-harness tasks. No rule of the gate reads them."""

from collections.abc import Mapping, Sequence

from components.records.part import Part


class TaskScore(Part):
    """One metric of one task, or of a group of tasks, for one model."""

    task: str
    metric: str
    """The metric's name in the task; if a filter processed the answers, with the filter's name."""
    value: float | None
    """The metric's value; None if it is not a finite number."""
    stderr: float | None = None
    """Standard error of `value` over the task's documents; None if the task reports none."""


class HarnessScores(Part):
    """Scores of all tasks that a run asked for."""

    lm_eval: str
    """Version of lm-evaluation-harness that ran; it also fixes the tasks that it ships, and their versions."""
    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, as in the config."""
    limit: int | None = None
    """Maximum number of documents per task; None means all."""
    include_sha256: str = ""
    """SHA-256 of the folder of custom tasks (`evaluate.lm_eval_include`); empty if there is none."""
    base_format: str = ""
    """Number format of the base's weights: bf16, nf4 or int8."""
    left_out: str = ""
    """Why no model was measured; empty if one was."""
    scores: dict[str, tuple[TaskScore, ...]] = {}
    """Scores by role; roles on another base than the candidate's are left out."""

    def same_tasks(self, other: "HarnessScores") -> bool:
        """Whether these scores and the other's are comparable: same harness version, tasks, limit and custom tasks."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("lm_eval", "tasks", "limit", "include_sha256")
        )

    def score(self, role: str, task: str, metric: str) -> TaskScore | None:
        """Return one model's score for one metric of one task; None if it was not measured."""
        return next((each for each in self.scores.get(role, ()) if (each.task, each.metric) == (task, metric)), None)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The (task, metric) pairs that were measured, in the order of the tasks."""
        return list(dict.fromkeys((each.task, each.metric) for scores in self.scores.values() for each in scores))

    @property
    def summary(self) -> list[str]:
        """One line for each task or group in the config, or for everything measured if the config names tags."""
        if self.left_out:
            return [f"lm-eval: left out, {self.left_out}"]
        measured = list(dict.fromkeys(task for task, _ in self.rows))
        shown = self.tasks if set(self.tasks) <= set(measured) else measured
        return [f"lm-eval {task}: {', '.join(self._scores_of(task))}" for task in shown]

    def _scores_of(self, task: str) -> Sequence[str]:
        result = []
        for metric in (metric for name, metric in self.rows if name == task):
            found: Mapping[str, TaskScore | None] = {role: self.score(role, task, metric) for role in self.scores}
            result.append(f"{metric} {', '.join(f'{role} {score_text(each)}' for role, each in found.items())}")
        return result


def score_text(score: TaskScore | None) -> str:
    """Format a score with its standard error; a dash if there is no value."""
    if score is None or score.value is None:
        return "–"  # noqa: RUF001 - a dash for a number that is not there
    return f"{score.value:.4g}" + (f" ± {score.stderr:.2g}" if score.stderr is not None else "")
