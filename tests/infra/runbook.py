"""The commands of infra/README.md, as a shell would split them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from infra.checks.manifests import INFRA, OVERLAYS

RUNBOOK = INFRA / "README.md"
_SEPARATORS = {"|", ";", "&&"}
_IN_PROSE = {"kubectl", "helm", "fineloop", "make", "docker"}


@dataclass(frozen=True)
class Command:
    """One simple command, its variables replaced by what the runbook exports."""

    words: tuple[str, ...]

    @property
    def program(self) -> str:
        """What is run."""
        return self.words[0]

    @property
    def arguments(self) -> list[str]:
        """What follows."""
        return list(self.words[1:])

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands() -> list[Command]:
    """Every command of the fenced blocks, and of the prose between back-ticks when it begins with a known program.

    A line that names $OVERLAY gives one for each overlay.
    """
    text = RUNBOOK.read_text(encoding="utf-8")
    fence = re.compile(r"^```bash\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in fence.findall(text) for line in block.splitlines() if line.strip()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [
        line for line in re.findall(r"`([^`\n]+)`", prose) if re.match(r"(kubectl|helm|fineloop|make|docker) ", line)
    ]
    exported = dict(re.findall(r'^export (\w+)="?(.*?)"?$', "\n".join(lines), flags=re.MULTILINE))
    found = [command for line in lines for command in _expanded(line, exported)]
    return list(dict.fromkeys(found))


def _expanded(line: str, exported: dict[str, str]) -> Iterator[Command]:
    for overlay in OVERLAYS if "$OVERLAY" in line else ("",):
        replaced = line
        for name, value in {**exported, "OVERLAY": overlay}.items():
            replaced = replaced.replace(f"${name}", value)
        yield from _simple(replaced)


def _simple(line: str) -> Iterator[Command]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _SEPARATORS:
            words.append(word)
        elif words:
            yield Command(tuple(words[: words.index(">")] if ">" in words else words))
            words = []
