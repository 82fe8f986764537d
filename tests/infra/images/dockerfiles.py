"""What a Dockerfile must be, as policies that take its parsed instructions and give what is wrong with it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

SECRET = re.compile(r"token|secret|passw|credential|access_key|api_?key", re.IGNORECASE)
URL = re.compile(r"https?://|git@")
INSTALL = re.compile(r"\b(?:pip3?|uv) (?:pip )?install\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction, on one line whatever its continuation lines were."""

    name: str
    arguments: str


def parse(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    words = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [Instruction(name.upper(), " ".join(rest)) for name, *rest in words]


def base_is_pinned(dockerfile: list[Instruction]) -> Iterator[str]:
    """Each FROM takes its digest from an ARG without a default, so that a build without one stops."""
    demanded = {i.arguments for i in dockerfile if i.name == "ARG" and "=" not in i.arguments}
    for image in (i.arguments for i in dockerfile if i.name == "FROM"):
        digest = re.search(r"@\$\{(\w+)\}$", image)
        if not digest:
            yield f"FROM {image} is not pinned by a digest"
        elif digest[1] not in demanded:
            yield f"ARG {digest[1]} has a default or is missing"
        if re.search(r":latest\b", image) or ":" not in image.partition("@")[0]:
            yield f"FROM {image} names no version"


def runs_without_root(dockerfile: list[Instruction]) -> Iterator[str]:
    users = [i.arguments for i in dockerfile if i.name == "USER"]
    if not users or not re.fullmatch(r"1000:\d+", users[-1]):
        yield f"the last USER is {users[-1:]}, not 1000:<group>; Kubernetes checks numbers only"


def installs_by_hash(dockerfile: list[Instruction]) -> Iterator[str]:
    for command in chain.from_iterable(i.arguments.split("&&") for i in dockerfile if i.name == "RUN"):
        if INSTALL.search(command):
            for option in ("--require-hashes", "--no-deps", "--only-binary :all:", "--no-cache-dir"):
                if option not in command:
                    yield f"{option} is missing in {command.strip()}"
            if "--no-binary" in command and "--no-build-isolation" not in command:
                yield f"{command.strip()} builds with tools that no lock holds"
            if re.search(r"--(?:extra-)?index-url|--find-links|--trusted-host", command):
                yield f"{command.strip()} names an index"
        if re.search(r"\b(?:curl|wget|git clone|apt-get|conda)\b", command):
            yield f"{command.strip()} brings what no lock holds"


def brings_nothing_from_elsewhere(dockerfile: list[Instruction]) -> Iterator[str]:
    for instruction in dockerfile:
        if instruction.name == "ADD":
            yield f"ADD {instruction.arguments}: use COPY"
        if instruction.name == "COPY" and URL.search(instruction.arguments):
            yield f"COPY {instruction.arguments} comes from the network"
        if instruction.name == "COPY" and re.search(r"--chown|(?:^|\s)\.\s", instruction.arguments):
            yield f"COPY {instruction.arguments} takes the whole context, or lets the running user change the code"


def holds_no_secret(dockerfile: list[Instruction]) -> Iterator[str]:
    for instruction in dockerfile:
        if instruction.name in ("ARG", "ENV", "LABEL") and SECRET.search(instruction.arguments):
            yield f"{instruction.name} {instruction.arguments} would stay in the image"


def writes_to_tmp_alone(dockerfile: list[Instruction]) -> Iterator[str]:
    """With HOME, TMPDIR and every cache below /tmp the root file system may be read-only."""
    variables = environment(dockerfile)
    for name in ("HOME", "TMPDIR", *(name for name in variables if re.search(r"_HOME$|_TMPDIR$|_DIR$", name))):
        if not re.match(r"/tmp(/|$)", variables.get(name, "")):
            yield f"{name} is {variables.get(name)!r}, not below /tmp"
    if variables.get("PYTHONDONTWRITEBYTECODE") != "1":
        yield "Python would write bytecode beside the code"


def finds_the_code(dockerfile: list[Instruction]) -> Iterator[str]:
    variables = environment(dockerfile)
    if variables.get("PYTHONPATH") != "/app":
        yield f"PYTHONPATH is {variables.get('PYTHONPATH')!r}, not /app"
    if variables.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV") != "0":
        yield "`uv run` anywhere above a Ray worker would change the worker's environment"


def says_what_it_is(dockerfile: list[Instruction]) -> Iterator[str]:
    labels = " ".join(i.arguments for i in dockerfile if i.name == "LABEL")
    for label in ("title", "description", "licenses", "revision"):
        if f"org.opencontainers.image.{label}=" not in labels:
            yield f"the label org.opencontainers.image.{label} is missing"


def environment(dockerfile: list[Instruction]) -> dict[str, str]:
    text = " ".join(i.arguments for i in dockerfile if i.name == "ENV")
    return dict(re.findall(r"(\w+)=(\S+)", text))


POLICIES: tuple[Callable[[list[Instruction]], Iterator[str]], ...] = (
    base_is_pinned,
    runs_without_root,
    installs_by_hash,
    brings_nothing_from_elsewhere,
    holds_no_secret,
    writes_to_tmp_alone,
    finds_the_code,
    says_what_it_is,
)


def faults(text: str) -> list[str]:
    dockerfile = parse(text)
    return [fault for policy in POLICIES for fault in policy(dockerfile)]
