"""What tasks of lm-evaluation-harness say of the models of a comparison. No rule of the gate reads it."""

from collections.abc import Mapping, Sequence

from components.records.part import Part


class TaskScore(Part):
    """One metric of one task, or of a group of tasks, for one model."""

    task: str
    metric: str
    """As the task names it; of answers that a filter has read, with the filter's name."""
    value: float | None
    """None where it is no finite number."""
    stderr: float | None = None
    """Of the value, over the task's documents; None where the task has none."""


class HarnessScores(Part):
    """All tasks that a run asked for."""

    lm_eval: str
    """The version that ran; the tasks that it ships, and their versions, are fixed with it."""
    tasks: tuple[str, ...]
    """As the config names them: tasks, groups or tags."""
    limit: int | None = None
    """Documents of each task; None takes all."""
    include_sha256: str = ""
    """Of the folder with tasks of one's own; empty where there is none."""
    base_format: str = ""
    """What the base was in: bf16, nf4 or int8."""
    left_out: str = ""
    """Why no model was measured; empty where one was."""
    scores: dict[str, tuple[TaskScore, ...]] = {}
    """By role; roles on another base than the candidate's are left out."""

    def same_tasks(self, other: "HarnessScores") -> bool:
        """Whether the other's numbers stand beside these."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("lm_eval", "tasks", "limit", "include_sha256")
        )

    def score(self, role: str, task: str, metric: str) -> TaskScore | None:
        """One number of one model; None where it was not measured."""
        return next((each for each in self.scores.get(role, ()) if (each.task, each.metric) == (task, metric)), None)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Task and metric of all that was measured, in the order of the tasks."""
        return list(dict.fromkeys((each.task, each.metric) for scores in self.scores.values() for each in scores))

    @property
    def summary(self) -> list[str]:
        """A line a task: of those that the config names, or of all where it names more than tasks and groups."""
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
    """The value with its standard error."""
    if score is None or score.value is None:
        return "–"  # noqa: RUF001 - a dash for a number that is not there
    return f"{score.value:.4g}" + (f" ± {score.stderr:.2g}" if score.stderr is not None else "")
