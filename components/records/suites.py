"""What an evaluation finds outside the domain: suites of questions, whose answers pass or do not."""

from collections.abc import Mapping, Sequence

from components.records.part import Part

MOST_LOST, MOST_CHARS = 3, 300


class LostItem(Part):
    """A question that the base's answer passes and the candidate's does not."""

    prompt: str
    answer: str
    """The candidate's, or its beginning."""


class Suite(Part):
    """Which questions of a suite each model passes."""

    name: str
    title: str
    meaning: str
    """What passes, in a few words."""
    sha256: str
    """Of the questions as the base's tokenizer reads them, the criteria of answers, and their longest length."""
    base_format: str = ""
    """What the base was in: bf16, nf4 or int8."""
    items: int
    left_out: str = ""
    """Why no model was asked; empty where one was."""
    passes: dict[str, list[bool]]
    """By role, of each item; roles on another base than the candidate's are left out."""
    lost: tuple[LostItem, ...] = ()
    """A few of those that the candidate has lost."""

    def passed(self, role: str) -> int | None:
        """How many items; None where the role was not asked."""
        return sum(self.passes[role]) if role in self.passes else None

    @property
    def summary(self) -> str:
        """Who passes how many, in a line."""
        if self.left_out:
            return f"suite {self.name}: left out, {self.left_out}"
        counts = ", ".join(f"{role} {sum(passes)}" for role, passes in self.passes.items())
        return f"suite {self.name}: of {self.items} items {counts}"

    def won_and_lost(self, against: str) -> tuple[int, int] | None:
        """Items that the candidate alone passes, and that the other alone does; None where either was not asked."""
        if "candidate" not in self.passes or against not in self.passes:
            return None
        pairs = list(zip(self.passes["candidate"], self.passes[against], strict=True))
        return pairs.count((True, False)), pairs.count((False, True))

    def with_answers(
        self, passes: Mapping[str, list[bool]], said: Sequence[str] | None, prompts: Sequence[str]
    ) -> "Suite":
        """With what was found, and a few of the answers that the candidate gave, if it was asked."""
        lost: list[LostItem] = []
        if said is not None and "base" in passes:
            items = zip(prompts, said, passes["base"], passes["candidate"], strict=True)
            lost = [
                LostItem(prompt=prompt, answer=answer[:MOST_CHARS])
                for prompt, answer, before, after in items
                if before and not after
            ]
        return self.model_copy(update={"passes": dict(passes), "lost": tuple(lost[:MOST_LOST])})
