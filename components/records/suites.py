"""Results of an evaluation outside the domain: suites of questions, whose answers pass or fail."""

from collections.abc import Mapping, Sequence

from components.records.part import Part

MOST_LOST, MOST_CHARS = 3, 300


class LostItem(Part):
    """A question to which the base's answer passes and the candidate's does not."""

    prompt: str
    answer: str
    """The candidate's answer, or its beginning."""


class Suite(Part):
    """Which questions of a suite each model passes."""

    name: str
    title: str
    meaning: str
    """What counts as a pass, in a few words."""
    sha256: str
    """SHA-256 of the questions as the base tokenizes them, the criteria for answers, and their maximum length."""
    base_format: str = ""
    """Number format of the base's weights: bf16, nf4 or int8."""
    items: int
    left_out: str = ""
    """Why no model was asked; empty if one was."""
    passes: dict[str, list[bool]]
    """Whether each item passes, by role; roles on another base than the candidate's are left out."""
    lost: tuple[LostItem, ...] = ()
    """A few of the items that the base passes and the candidate does not."""

    def passed(self, role: str) -> int | None:
        """Return the number of items that a role passes; None if it was not asked."""
        return sum(self.passes[role]) if role in self.passes else None

    @property
    def summary(self) -> str:
        """Number of items that each role passes, in one line."""
        if self.left_out:
            return f"suite {self.name}: left out, {self.left_out}"
        counts = ", ".join(f"{role} {sum(passes)}" for role, passes in self.passes.items())
        return f"suite {self.name}: of {self.items} items {counts}"

    def won_and_lost(self, against: str) -> tuple[int, int] | None:
        """Count the items that only the candidate passes, and only the other; None if either was not asked."""
        if "candidate" not in self.passes or against not in self.passes:
            return None
        pairs = list(zip(self.passes["candidate"], self.passes[against], strict=True))
        return pairs.count((True, False)), pairs.count((False, True))

    def with_answers(
        self, passes: Mapping[str, list[bool]], said: Sequence[str] | None, prompts: Sequence[str]
    ) -> "Suite":
        """Return a copy with the passes, and a few of the candidate's lost items if it was asked."""
        lost: list[LostItem] = []
        if said is not None and "base" in passes:
            items = zip(prompts, said, passes["base"], passes["candidate"], strict=True)
            lost = [
                LostItem(prompt=prompt, answer=answer[:MOST_CHARS])
                for prompt, answer, before, after in items
                if before and not after
            ]
        return self.model_copy(update={"passes": dict(passes), "lost": tuple(lost[:MOST_LOST])})
