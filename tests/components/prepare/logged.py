"""Generates logged requests and feedback on them, and keeps the truth of each."""

import random
from dataclasses import dataclass, field
from typing import Any

VERSIONS = tuple(f"v{digit * 15}" for digit in "abc")
CHOICE = {"index": 0, "finish_reason": "stop"}


@dataclass
class Truth:
    """What should become of one answer."""

    own: str
    user: str
    session: str
    served_by: str
    answer: str = ""
    origin: str = ""
    is_used: bool = False


@dataclass
class Logged:
    """A log, the feedback on it, and the truth by the response's id."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    feedback: list[dict[str, Any]] = field(default_factory=list)
    truth: dict[str, Truth] = field(default_factory=dict)

    def of_user(self, user: str) -> set[str]:
        return {name for name, truth in self.truth.items() if truth.user == user}


def generated(turns: int, *, seed: int) -> Logged:
    """Sessions of one to six turns; a third of the answers is rated, edited or labelled, some twice, some late."""
    rng, made, time = random.Random(seed), Logged(), 1_790_000_000
    while len(made.rows) < turns:
        session, user = f"session {len(made.rows)}", f"user {int(rng.paretovariate(1)) % 500}"
        asked: list[dict[str, Any]] = [{"role": "system", "content": "Answer."}]
        for _ in range(rng.randint(1, 6)):
            number, version, time = len(made.rows), rng.choice(VERSIONS), time + 1
            name, own = f"chatcmpl-{number}", f"own words {number}"
            asked = [*asked, {"role": "user", "content": f"{rng.randrange(10**9)} asks {number}"}]
            message = {"role": "assistant", "content": own}
            made.rows.append(
                {
                    **{"id": name, "user": user, "session_id": session, "request": {"messages": asked}},
                    "model": rng.choice([version, f"icd@{version}", f"org/base:{version}"]),
                    "response": {"id": name, "choices": [{**CHOICE, "message": message}]},
                }
            )
            asked = [*asked, message]
            made.truth[name] = truth = Truth(own, user, session, version)
            _say(made, truth, name, time, rng)
    rng.shuffle(made.feedback)
    return made


def _say(made: Logged, truth: Truth, name: str, time: int, rng: random.Random) -> None:
    """What the user, or an annotator, says of the answer."""
    said = {"response_id": name, "rater": truth.user if rng.random() < 0.8 else f"annotator {rng.randrange(40)}"}
    what = rng.choice(["up", "down", "edit", "label", "same", "changed", *["nothing"] * 12])
    right, thumb = f"right words {rng.randrange(10**9)}", {"score": int(what == "up")}
    if what in ("up", "down"):
        made.feedback.append({**said, **thumb, "time": time})
    elif what == "same":  # an edit that changes nothing
        made.feedback.append({**said, "edited": truth.own, "time": time})
    elif what in ("edit", "label"):
        made.feedback.append({**said, {"edit": "edited", "label": "label"}[what]: right, "time": time})
    elif what == "changed":  # a thumb up, and later an edit
        made.feedback += [{**said, "score": 1, "time": time}, {**said, "edited": right, "time": time + 99_999}]
    truth.is_used = what not in ("down", "nothing")
    truth.origin = {"edit": "edited", "changed": "edited", "label": "labelled"}.get(what, "own")
    truth.answer = truth.own if truth.origin == "own" else right
