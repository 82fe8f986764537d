"""The Dockerfiles keep the policies of `dockerfiles.py`, each of which is broken here and seen to notice."""

import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from components.registry import lineage
from components.step import kfp
from tests.infra.images.dockerfiles import environment, faults, parse

ROOT = Path(__file__).resolve().parents[3]
IMAGES = ROOT / "infra" / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
STEP = (IMAGES / "step.Dockerfile").read_text(encoding="utf-8")


def test_there_are_two_images() -> None:
    assert [path.name for path in DOCKERFILES] == ["step.Dockerfile", "train.Dockerfile"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_keeps_every_policy(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("good", "bad", "fault"),
    [
        ("@${PYTHON_DIGEST}", "", "is not pinned"),
        ("ARG PYTHON_DIGEST\n", "ARG PYTHON_DIGEST=sha256:00\n", "has a default"),
        ("python:3.11-slim-trixie", "python:latest", "names no version"),
        ("python:3.11-slim-trixie", "python", "names no version"),
        ("USER 1000:1000", "USER 0:0", "the last USER"),
        ("USER 1000:1000", "USER fineloop", "Kubernetes checks numbers"),
        ("USER 1000:1000\n", "USER 1000:1000\nUSER root\n", "the last USER"),
        ("--require-hashes --only-binary :all: -r /locks/build.lock", "-r /locks/build.lock", "--require-hashes"),
        ("pip install --no-cache-dir", "pip install", "--no-cache-dir is missing"),
        ("--no-build-isolation", "", "tools that no lock holds"),
        ("--no-build-isolation", "--no-build-isolation --index-url https://host/simple", "names an index"),
        ("RUN python -m compileall -q /app", "RUN curl -O https://host/file", "no lock holds"),
        ("COPY components /app/components", "ADD https://host/components.tgz /app", "use COPY"),
        ("COPY components /app/components", "COPY https://host/c /app/components", "comes from the network"),
        ("COPY components /app/components", "COPY . /app", "the whole context"),
        ("COPY components", "COPY --chown=1000:1000 components", "change the code"),
        ("ARG REVISION", "ARG HF_TOKEN\nARG REVISION", "would stay in the image"),
        ("HOME=/tmp", "AWS_SECRET_ACCESS_KEY=x HOME=/tmp", "would stay in the image"),
        ("HOME=/tmp", "HOME=/root", "HOME is '/root'"),
        ("TMPDIR=/tmp", "TMPDIR=/var/tmp", "TMPDIR is '/var/tmp'"),
        ("HOME=/tmp", "HOME=/tmp HF_HOME=/models", "HF_HOME is '/models'"),
        ("PYTHONDONTWRITEBYTECODE=1", "PYTHONDONTWRITEBYTECODE=", "bytecode"),
        ("PYTHONPATH=/app", "PYTHONPATH=/src", "PYTHONPATH is '/src'"),
        ("RAY_ENABLE_UV_RUN_RUNTIME_ENV=0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV=1", "uv run"),
        ("org.opencontainers.image.licenses", "licenses", "image.licenses is missing"),
    ],
)
def test_a_broken_dockerfile_is_noticed(good: str, bad: str, fault: str) -> None:
    assert good in STEP
    assert any(fault in found for found in faults(STEP.replace(good, bad, 1)))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = hadolint(path.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_a_shell_without_pipefail() -> None:
    done = hadolint(STEP.replace("RUN python -m compileall -q /app", "RUN python -m compileall /app | cat"))
    assert done.returncode != 0
    assert "DL4006" in done.stdout


def hadolint(text: str) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run(
        [program, "--no-color", "-"], input=text, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_images_have_the_names_that_the_pipeline_uses() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert version
    built = {f"{name}:{version[1]}" for name in re.findall(r"--tag (\S+):\$\(VERSION\)", makefile)}
    assert built == {kfp.IMAGE, f"fineloop/train:{version[1]}"}
    for path in DOCKERFILES:
        title = re.search(r'image\.title="([^"]+)"', path.read_text(encoding="utf-8"))
        assert title
        assert f"{title[1]}:{version[1]}" in built


def test_what_a_dockerfile_copies_is_all_that_the_build_context_holds() -> None:
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    ]
    copied = {
        source
        for path in DOCKERFILES
        for instruction in parse(path.read_text(encoding="utf-8"))
        if instruction.name == "COPY"
        for source in instruction.arguments.split()[:-1]
    }
    assert {source for source in copied if not any(fnmatch(source, pattern) for pattern in kept)} == set()
    assert [pattern for pattern in kept if not any(fnmatch(source, pattern) for source in copied)] == []
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_a_training_can_read_which_commit_its_image_was_built_from(tmp_path: Path) -> None:
    train = parse((IMAGES / "train.Dockerfile").read_text(encoding="utf-8"))
    assert environment(train)["FINELOOP_REVISION"] == '"${REVISION}"'
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert makefile.count("--build-arg REVISION=$(REVISION)") == len(DOCKERFILES)
    asks = re.search(r"^REVISION = \$\$\((.*)\)$", makefile, flags=re.MULTILINE)
    assert asks

    def call(command: str) -> str:
        done = subprocess.run(shlex.split(command), cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    call("git init --quiet")
    (tmp_path / "file").write_text("one")
    call("git add file")
    call("git -c user.name=n -c user.email=e@x commit --quiet --no-verify --message one")
    call("git -c user.name=n -c user.email=e@x tag --annotate v1 --message v1")
    commit = call("git rev-parse HEAD")
    assert lineage.code_of_image(call(asks[1])) == lineage.Code(commit, dirty=False)
    (tmp_path / "file").write_text("two")
    assert lineage.code_of_image(call(asks[1])) == lineage.Code(commit, dirty=True)
