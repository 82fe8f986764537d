import ast
import pickle
from pathlib import Path

import pytest

from components.shared import errors
from components.shared.errors import FineloopError, UserError

ROOT = Path(__file__).resolve().parents[3]


def every_error() -> list[type[FineloopError]]:
    found = [FineloopError]
    for kind in found:
        found += kind.__subclasses__()
    return [kind for kind in found if kind.__module__ == errors.__name__]


def drawn() -> dict[str, str]:
    """Each class of the tree in the module's docstring, and the one that it hangs from."""
    tree: dict[str, str] = {}
    branch: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        words = line.lstrip("│├└─ ").split()
        if not words or not hasattr(errors, words[0]):
            continue
        depth = (len(line) - len(line.lstrip("│├└─ "))) // 4
        branch[depth:] = [words[0]]
        tree[words[0]] = branch[depth - 1] if depth else ""
    return tree


@pytest.mark.parametrize("kind", every_error())
def test_every_error_survives_pickling_with_its_message(kind: type[FineloopError]) -> None:
    error = kind("train.epochs = 0: should be more")
    error.add_note("and so on")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is kind
    assert str(again) == "train.epochs = 0: should be more"
    assert again.__notes__ == ["and so on"]


@pytest.mark.parametrize("kind", every_error())
def test_every_error_is_found_by_its_name(kind: type[FineloopError]) -> None:
    error = errors.by_name(kind.__name__, "what failed")
    assert type(error) is kind
    assert str(error) == "what failed"


@pytest.mark.parametrize("name", ["KeyError", "Novelty", ""])
def test_a_name_from_elsewhere_is_kept_in_the_message(name: str) -> None:
    error = errors.by_name(name, "what failed")
    assert type(error) is FineloopError
    assert str(error) == f"{name}: what failed"


@pytest.mark.parametrize("kind", every_error())
def test_a_mistake_of_the_user_is_exit_2_and_all_else_exit_1(kind: type[FineloopError]) -> None:
    assert kind("x").exit_code == (2 if issubclass(kind, UserError) else 1)


def test_every_error_that_may_leave_its_module_is_in_the_tree() -> None:
    known, elsewhere = {kind.__name__ for kind in every_error()}, []
    classes = [
        (path, node)
        for package in ("components", "pipelines", "ray_jobs")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and path != Path(errors.__file__)
    ]
    for path, node in classes:
        bases = {base.id if isinstance(base, ast.Name) else ast.unparse(base).rpartition(".")[2] for base in node.bases}
        if bases & known and not node.name.startswith("_"):
            elsewhere.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert elsewhere == []


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    real = {
        kind.__name__: next((base.__name__ for base in kind.__bases__ if issubclass(base, FineloopError)), "")
        for kind in every_error()
    }
    assert drawn() == real


@pytest.mark.parametrize("kind", every_error())
def test_the_docstring_names_the_builtin_that_an_error_also_is(kind: type[FineloopError]) -> None:
    line = next(line for line in (errors.__doc__ or "").splitlines() if kind.__name__ in line.split())
    builtins = [
        base.__name__ for base in kind.__bases__ if not issubclass(base, FineloopError) and base is not Exception
    ]
    assert all(f"({name})" in line for name in builtins)
    assert ("Error)" in line) == bool(builtins)
