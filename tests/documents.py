"""The pages that people read, and the commands that they show."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    ".github/CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)


def commands_in(document: str, program: str) -> list[str]:
    """Each command line of a document's fenced code blocks, or between back-ticks, that starts with `program`."""
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)
    # A command begins its line, or follows a pipe, `$(` or a folder.
    starts = re.compile(rf"(?:^\s*|[|;(]\s*|/){program} (?P<rest>[^|;)#>`]*)")
    return [f"{program} {found['rest'].strip()}" for line in lines for found in starts.finditer(line)]
