"""Both images, built once for the tests of the podman tier.

FINELOOP_STEP_IMAGE and FINELOOP_TRAIN_IMAGE name images that exist and are taken instead: those of `make images`.
"""

import os
from collections.abc import Iterator

import pytest

from tests.infra.images import bases, containers
from tests.infra.images.containers import build, remove, tag

STEP, TRAIN = tag("step"), tag("train")


@pytest.fixture(scope="session")
def python_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield bases.python(tmp_path_factory.mktemp("debian"))
    remove(bases.PYTHON)


@pytest.fixture(scope="session")
def step_image(request: pytest.FixtureRequest) -> Iterator[str]:
    if given := os.environ.get(containers.STEP):
        yield given
    else:
        yield build("infra/images/step.Dockerfile", base=request.getfixturevalue("python_base"), name=STEP)
        remove(STEP)


@pytest.fixture(scope="session")
def train_image(request: pytest.FixtureRequest) -> Iterator[str]:
    if given := os.environ.get(containers.TRAIN):
        yield given
    else:
        base = bases.ray(request.getfixturevalue("python_base"))
        yield build("infra/images/train.Dockerfile", base=base, name=TRAIN)
        remove(TRAIN, bases.RAY)
