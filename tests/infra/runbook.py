"""The commands of infra/README.md, as a shell would split them."""

import re
import shlex
from collections.abc import Iterator
from string import Template

from infra.checks.manifests import INFRA, OVERLAYS

RUNBOOK = (INFRA / "README.md").read_text(encoding="utf-8")
Command = tuple[str, ...]


def commands(*beginning: str) -> list[Command]:
    """Each command, or those that begin so: of the fenced blocks, and of the prose where a known program comes first.

    Variables are replaced by what the runbook exports; a line that names $OVERLAY gives one for each overlay.
    """
    blocks = re.findall(r"^```bash\n(.*?)^```", RUNBOOK, flags=re.DOTALL | re.MULTILINE)
    prose = re.findall(r"`((?:kubectl|helm|fineloop|make|docker) [^`\n]+)`", RUNBOOK)
    lines = [*"".join(blocks).splitlines(), *prose]
    exported = dict(re.findall(r'^export (\w+)="?(.*?)"?$', "\n".join(lines), flags=re.MULTILINE))
    found: dict[Command, None] = {}
    for line in lines:
        for overlay in OVERLAYS if "$OVERLAY" in line else ("",):
            found |= dict.fromkeys(_split(Template(line).safe_substitute(exported, OVERLAY=overlay)))
    return [command for command in found if command[: len(beginning)] == beginning]


def after(command: Command, flag: str) -> str:
    """The word that follows a flag."""
    return command[command.index(flag) + 1]


def _split(line: str) -> Iterator[Command]:
    """The simple commands of a line, without where their output goes."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in {"|", ";", "&&"}:
            words.append(word)
        elif words:
            yield tuple(words[: words.index(">")] if ">" in words else words)
            words = []
