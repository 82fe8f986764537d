"""The Dockerfiles: what hadolint and checkov do not ask of them, which `make infra-lint` runs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from components.registry import lineage
from components.step import step
from infra.checks.manifests import INFRA, ROOT

IMAGES = INFRA / "images"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
every_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def given(path: Path, name: str) -> list[str]:
    """The arguments of each instruction of a name, on one line whatever its continuation lines were."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return re.findall(rf"^{name} (.*)$", joined, flags=re.MULTILINE)


@every_dockerfile
def test_all_that_it_brings_is_pinned_by_a_digest_or_a_hash(path: Path) -> None:
    (base,) = re.findall(r"^[\w./]+:[\w.-]+@\$\{(\w+)\}$", "\n".join(given(path, "FROM")))
    assert base in given(path, "ARG"), "with a default, a build would not ask for it"
    commands = [command for run in given(path, "RUN") for command in run.split("&&")]
    installs = [command for command in commands if "pip install" in command]
    assert len(installs) == 2
    for install in installs:
        assert all(option in install for option in ("--require-hashes", "--no-deps", "--only-binary :all:"))
        assert "--no-binary" not in install or "--no-build-isolation" in install, "builds with tools that no lock holds"
    assert [found for found in commands if re.search(r"index-url|find-links|curl|wget|git |apt-get|conda", found)] == []
    assert [copied for copied in given(path, "COPY") if re.search(r"://|--chown|^\. ", copied)] == []


@every_dockerfile
def test_it_runs_without_root_writes_to_tmp_alone_and_holds_no_secret(path: Path) -> None:
    assert re.fullmatch(r"1000:\d+", given(path, "USER")[-1]), "Kubernetes checks numbers only"
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(given(path, "ENV"))))
    folders = {name: value for name, value in variables.items() if re.search(r"HOME$|TMPDIR$|_DIR$", name)}
    assert folders.keys() >= {"HOME", "TMPDIR"}
    assert [name for name, folder in folders.items() if not re.match(r"/tmp(/|$)", folder)] == []
    assert (variables["PYTHONDONTWRITEBYTECODE"], variables["PYTHONPATH"]) == ("1", "/app")
    assert variables["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0", "`uv run` would change a worker's environment"
    kept = " ".join([*given(path, "ARG"), *variables])
    assert not re.search(r"token|secret|passw|credential|key", kept, flags=re.IGNORECASE), "it would stay in the image"


def test_the_images_have_the_names_that_the_pipeline_uses() -> None:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    built = {f"{name}:{version}" for name in re.findall(r"--tag (\S+):\$\(VERSION\)", MAKEFILE)}
    assert built == {step.IMAGE, f"fineloop/train:{version}"}


def test_a_training_can_read_which_commit_its_image_was_built_from(tmp_path: Path) -> None:
    assert 'FINELOOP_REVISION="${REVISION}"' in given(IMAGES / "train.Dockerfile", "ENV")
    assert MAKEFILE.count("--build-arg REVISION=$(REVISION)") == len(DOCKERFILES)
    (asked,) = re.findall(r"^REVISION = \$\$\((.*)\)$", MAKEFILE, flags=re.MULTILINE)

    def call(command: str) -> str:
        done = subprocess.run(shlex.split(command), cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    call("git init --quiet")
    call("git -c user.name=n -c user.email=e@x commit --quiet --allow-empty --no-verify --message one")
    assert lineage.code_of_image(call(asked)) == lineage.Code(call("git rev-parse HEAD"), dirty=False)
