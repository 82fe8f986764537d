"""The documentation says what the code says: generated pages, links, and the config keys that pages name."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.config.schema import RunConfig
from docs.generate import commands, pages
from docs.json_keys import FREE, JSON_KEYS
from pipelines import cli
from tests.documents import DOCUMENTS, commands_in

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
LINKED = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "infra").rglob("README.md"))]
SECTIONS = "|".join(RunConfig.model_fields)
RUN_BY = ("cluster", "e2e", "faults", "frozen", "journeys", "pipelines")
"""Folders of tests that run commands."""


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_a_generated_file_is_what_the_code_says(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == pages()[path], "run `make docs`"


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not leads_somewhere(document, link)] == []


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(document: Path) -> None:
    tops = "components|docs|infra|pipelines|ray_jobs|tests"
    named = re.findall(
        rf"(?<![\w/.])((?:{tops})(?:/[\w.-]+)+\.(?:py|json|md|toml|yaml|lock))", document.read_text("utf-8")
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def leads_somewhere(document: Path, link: str) -> bool:
    if "://" in link:
        return True
    file, _, anchor = link.partition("#")
    target = document.parent / file if file else document
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, punctuation dropped, a hyphen for each space."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_command_that_a_page_shows_is_run_by_a_test() -> None:
    """By its verb and options; docs/cli.md, which is the parser's own text, aside.

    The values of --set are loaded by `test_every_fineloop_command_of_the_documents_exists`.
    """
    run = list(commands_of_tests())
    shown = {command for page in DOCUMENTS if page != "docs/cli.md" for command in commands_in(page, "fineloop")}
    verbs = {tuple(name.split()[1:]) for name, _ in commands(cli.parser(), "fineloop")}
    missing = []
    for command in sorted(shown):
        words = shlex.split(command)[1:]
        verb = next((verb for verb in sorted(verbs, key=len, reverse=True) if tuple(words[: len(verb)]) == verb), None)
        options = {word.partition("=")[0] for word in words if word.startswith("-")} - {"--set"}
        if verb and not any(f" {' '.join(verb)} " in f" {' '.join(each)} " and options <= {*each} for each in run):
            missing.append(command)
    assert missing == []
    assert len(shown) > 50


def commands_of_tests() -> Iterator[list[str]]:
    """The words of each call, list and tuple in a test that runs commands, the name of what is called first."""
    for path in sorted(path for folder in RUN_BY for path in (ROOT / "tests" / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call | ast.List | ast.Tuple | ast.Assign):
                called = [node.func.id] if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else []
                texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
                yield [*called, *(word for text in texts if isinstance(text, str) for word in text.split())]


@pytest.mark.parametrize("document", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_every_config_key_that_a_page_names_exists(document: Path) -> None:
    known = keys_of((ROOT / "docs" / "config.md").read_text(encoding="utf-8"))
    named = set(re.findall(rf"`({SECTIONS})((?:\.[a-z][a-z_0-9]*)+)(?!\.?\w)", document.read_text(encoding="utf-8")))
    keys = {section + key for section, key in named if not key.endswith(".py")}
    assert keys - known == set()


def keys_of(page: str) -> set[str]:
    """Every key of the generated page, and every section."""
    found = set()
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        section = part.partition("\n")[0]
        found |= {section, *(f"{section}.{key}" for key in re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE))}
    return found


def test_every_command_says_what_its_json_holds() -> None:
    named = {name.removeprefix("fineloop ") for name, _ in commands(cli.parser(), "fineloop")}
    assert {*JSON_KEYS, *FREE} == named


LIBRARIES = {"accelerate", "bitsandbytes", "deepspeed", "gguf", "kfp", "peft", "ray", "torch", "transformers"}


def test_every_file_that_patches_a_library_is_in_the_table_of_patches() -> None:
    table = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").partition("## Patched libraries")[2]
    files = [path for package in ("components", "pipelines", "ray_jobs") for path in (ROOT / package).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in files if patches(path)} == set(
        re.findall(r"`(\w+/[\w/]+\.py)`", table)
    )


def patches(path: Path) -> bool:
    """Whether a file assigns to what it imports from a library, or to a module's class, or imports what is private."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and of_library(node.module or "")]
    imports = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names = {alias.asname or alias.name for node in froms for alias in node.names}
    names |= {alias.asname or alias.name.partition(".")[0] for alias in imports if of_library(alias.name)}
    assigned = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    is_private = any(re.search(r"\._[a-z]", node.module or "") for node in froms)
    return is_private or any(is_theirs(target, names) for each in assigned for target in flat(each))


def of_library(module: str) -> bool:
    return module.partition(".")[0] in LIBRARIES


def flat(target: ast.expr) -> list[ast.expr]:
    return [each for inner in target.elts for each in flat(inner)] if isinstance(target, ast.Tuple) else [target]


def is_theirs(target: ast.expr, names: set[str]) -> bool:
    if isinstance(target, ast.Attribute) and target.attr == "__class__":
        return True
    root = target
    while isinstance(root, ast.Attribute | ast.Subscript):
        root = root.value
    return root is not target and isinstance(root, ast.Name) and root.id in names
