import pickle

import pytest

from components.shared import errors
from components.shared.errors import FineloopError, UserError


def every_error() -> list[type[FineloopError]]:
    found = [FineloopError]
    for kind in found:
        found += kind.__subclasses__()
    return [kind for kind in found if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", every_error())
def test_every_error_survives_pickling_is_found_by_its_name_and_sets_the_exit_code(kind: type[FineloopError]) -> None:
    error = errors.by_name(kind.__name__, "train.epochs = 0: should be more")
    error.add_note("and so on")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(error) is type(again) is kind
    assert str(again) == "train.epochs = 0: should be more"
    assert again.__notes__ == ["and so on"]
    assert kind("x").exit_code == (2 if issubclass(kind, UserError) else 1)


@pytest.mark.parametrize("name", ["KeyError", "Novelty", ""])
def test_a_name_from_elsewhere_is_kept_in_the_message(name: str) -> None:
    error = errors.by_name(name, "what failed")
    assert type(error) is FineloopError
    assert str(error) == f"{name}: what failed"
