"""How a command is declared, the arguments that many share and the values made from them, and what commands print."""

import argparse
import contextlib
import difflib
import inspect
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from components.shared.errors import UserError
from components.shared.machine import in_environment
from components.shared.protocol import printable
from pipelines.configs import DEFAULT_CONFIG

if TYPE_CHECKING:  # what is slow to load: the help needs none of it, and most commands do without kfp
    from components.config.schema import RunConfig
    from components.registry.versions import Version
    from components.store.store import Store
    from pipelines.kubeflow.client import Kubeflow
    from pipelines.kubeflow.compile import Package

EXIT_CODES = """exit codes:
  0  done; for a run: completed, whether the candidate was promoted or held
  2  the input is wrong (config, data, arguments), said in one message
  1  anything else failed"""


class Parser(argparse.ArgumentParser):
    """Parser that suggests a command for a mistyped one, and may have subcommands (verbs) beside its own arguments."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self.allow_abbrev = False
        self.verbs: dict[str, Parser] = {}
        self.words: list[str] = []

    def add_parser(self, name: str, *, help: str = "", **options: Any) -> "Parser":
        """Add a verb, as argparse's subparsers do: if it is the first argument, its parser reads the rest.

        Argparse itself does not allow subparsers beside an optional positional argument.
        """
        self.verbs[name] = Parser(prog=f"{self.prog} {name}", **options)
        return self.verbs[name]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, or with the verb's parser if the first argument is a verb."""
        self.words = sys.argv[1:] if args is None else [*args]
        if self.verbs and args and args[0] in self.verbs:
            return self.verbs[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the error, with a suggestion for what is mistyped, on stdout as JSON with --json; exit with code 2."""
        near: list[str] = []
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(wrong[1], re.findall(r"[\w-]+", wrong[2]), n=1)
        elif unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
        message += "".join(f": did you mean {name}?" for name in near)
        if "--json" in self.words:
            print(json.dumps({"error": {"kind": "UserError", "message": message}, "exit_code": 2}), flush=True)  # noqa: T201 - the answer
        super().error(message)


@dataclass(frozen=True)
class Answer:
    """A command's output, `body` for --json and `text` for people, and its exit code."""

    body: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    exit_code: int = 0
    is_aside: bool = False
    """The text accompanies other output and goes to stderr even without --json."""


Handler = Callable[[argparse.Namespace], Answer]
Takes = Callable[[Any], object]
"""Adds an argument, or what concerns several, to a parser."""


@dataclass(frozen=True)
class Command:
    """A function that is a command."""

    run: Handler
    takes: Sequence[Takes]
    example: str
    text: str
    """Its help; lists of commands show the first line."""

    def add_to(self, commands: Any, verb: str, *, is_listed: bool = True) -> Parser:
        """Add its parser."""
        first = self.text.partition("\n")[0].rstrip(".")
        parser: Parser = commands.add_parser(
            verb,
            **({"help": first[:1].lower() + first[1:]} if is_listed else {}),  # argparse lists what has a help
            description=textwrap.fill(" ".join(self.text.split()), 88),
            epilog=f"example:\n  {self.example}\n\n{EXIT_CODES}",
        )
        parser.set_defaults(command=self.run, parser=parser)
        for add in (*EVERYWHERE, *self.takes):
            add(parser)
        return parser


COMMANDS: dict[str, Command] = {}
"""Every command by its name; that of a verb of a group begins with the group's."""


def command(name: str, *takes: Takes, example: str, text: str = "") -> Callable[[Handler], Handler]:
    """Make a function the command `name`, with `text` or its docstring as help."""

    def register(run: Handler) -> Handler:
        COMMANDS[name] = Command(run, takes, example, text or inspect.getdoc(run) or "")
        return run

    return register


def option(usage: str, help: str | None = None, **settings: Any) -> Takes:
    """An argument of a command, as argparse's `add_argument` takes it: `usage` is its names and, if it takes one, its
    value. Without a value it is true or false, and a text that may be left out is empty then."""
    *names, value = usage.split()
    if not names or value.startswith("-"):
        names.append(value)
        if value.startswith("-") and not settings.keys() & {"action", "choices"}:
            settings["action"] = "store_true"
    else:
        settings["metavar"] = value
        settings |= {} if settings.keys() & {"type", "default", "action"} else {"default": ""}
    return methodcaller("add_argument", *names, help=help, **settings)


def either(*options: Takes, required: bool = False) -> Takes:
    """Options of which at most one may be given."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group(required=required)
        for add_option in options:
            add_option(group)

    return add


EVERYWHERE = (
    option("--json", "print one JSON object as the last line of stdout"),
    option("-v --verbose", "print everything that happens, on stderr"),
)
EXAMPLE = "TOML config (default: the built-in example, pipelines/configs/icd10.toml)"
MORE = {"action": "append", "default": [], "dest": "overrides"}
SET = option("--set KEY=VALUE", "replace one key, such as train.learning_rate=2e-4; may be repeated", **MORE)
CONFIG = (option("-c --config FILE", EXAMPLE, type=Path, default=DEFAULT_CONFIG), SET)
HERE = "where this machine's store, logs and reports lie (default: ./.fineloop)"
HOME = option("--home DIR", HERE, type=Path, default=Path(".fineloop"))
ADDRESS = option("--address URL", "Jobs API of a Ray cluster, such as http://HOST:8265")
REGISTRY = (*CONFIG, HOME)
"""What `opened_registry` needs."""
REFERENCE = option(
    "reference NAME[@ALIAS|@VERSION]", "NAME, NAME@ALIAS or NAME@VERSION; first digits of a version suffice"
)
NOTE = option(
    "--note TEXT",
    "what this run is for, shown in its report and in lists of runs (adapter.note)",
    **MORE,
    type=lambda text: f"adapter.note={json.dumps(text, ensure_ascii=False)}",
)

# Of the commands for Kubeflow.

KUBEFLOW = (
    option("--host URL", "Kubeflow Pipelines (default: KFP_ENDPOINT, the pod's, the kubeconfig's)"),
    option("--namespace NAME", "your namespace on a multi-user Kubeflow (default: KFP_NAMESPACE)"),
)
IMAGE = option("--image IMAGE", "image of every step, pinned by digest")
SERVICE_ACCOUNT = "fineloop-pipeline"
ACCOUNT = option(
    "--service-account NAME",
    f"Kubernetes account of the steps (default: {SERVICE_ACCOUNT}, or as it is; '' means the server's)",
    default=SERVICE_ACCOUNT,
)
PIPELINE = (
    IMAGE,
    option("--param NAME=VALUE", "another parameter; may be repeated", action="append", default=[], dest="parameters"),
    ACCOUNT,
)
EXPERIMENT = option("--experiment NAME", "group of runs in the UI (default: fineloop)", default="fineloop")


ALL_OF_IT = {"data.max_records": "0", "data.window_days": "0", "data.replay_share": "0", "train.start_from": '"base"'}
"""Settings for other data than the example's, of which its config takes some a night."""


def load_config(options: argparse.Namespace) -> "RunConfig":
    """Return the validated config with its relative paths made absolute, because steps run in other folders.

    DATA of the command line is an override. Other data in the example's config are used whole and from the base on, and
    DATA gives the adapter its name, unless --set says otherwise. Raises ConfigError: the file is missing, or it or an
    override is wrong.
    """
    from components.config import config_file

    data, own = vars(options).pop("data", None), dict[str, str]()
    overridden = {override.partition("=")[0].strip() for override in options.overrides}
    if data:  # quoted, as a file may be called 2026-12-04 or true, which TOML takes for no text
        own["data.source"] = json.dumps(data, ensure_ascii=False)
        if options.config == DEFAULT_CONFIG:
            own["adapter.name"] = json.dumps(name_from(data))
    if options.config == DEFAULT_CONFIG and "data.source" in {*own, *overridden}:
        own |= ALL_OF_IT
    set_here = [f"{key}={value}" for key, value in own.items() if key not in overridden]
    options.overrides = [*set_here, *options.overrides]

    config = config_file.load(options.config, options.overrides)
    base = config.model.base
    if "://" not in base and Path(base).expanduser().is_dir():  # else it is a hub id
        base = str(Path(base).expanduser().absolute())
    return config.model_copy(
        update={
            "data": config.data.model_copy(
                update={name: _absolute(getattr(config.data, name)) for name in ("source", "feedback")}
            ),
            "model": config.model.model_copy(update={"base": base}),
        }
    )


def _absolute(sources: str | list[str]) -> str | list[str]:
    if isinstance(sources, str):
        return sources if "://" in sources or not sources else str(Path(sources).expanduser().absolute())
    return [str(_absolute(source)) for source in sources]


def name_from(source: str) -> str:
    """Return a registry name made from the file's name."""
    stem = Path(source.rstrip("/")).name.partition(".")[0]
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63] or "adapter"


def home_option(options: argparse.Namespace) -> str:
    """Return the --home option to append to a suggested command; empty for the default home."""
    return "" if options.home == Path(".fineloop") else f" --home {shlex.quote(str(options.home))}"


def print_err(text: str, end: str = "\n") -> None:
    """Print progress, a warning or an error on stderr; stdout is for the answer."""
    print(printable(text), file=sys.stderr, end=end, flush=True)  # noqa: T201 - the screen, beside the answer


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align the rows in columns, each as wide as its widest cell; the last column is not padded."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=True)), row[-1]])
        for row in rows
    )


def connected(options: argparse.Namespace) -> "Kubeflow":
    """Connect to the server that the options or the environment name."""
    from pipelines.kubeflow.client import connect

    return connect(os.environ, host=options.host, namespace=options.namespace)


def prepared(options: argparse.Namespace) -> "tuple[Package, dict[str, Any]]":
    """Compile the pipeline and resolve its parameters; both are checked before any request to Kubeflow."""
    from components.ray_cluster.submit import require_disk
    from pipelines.kubeflow.compile import check_reach, make_package, resolve_parameters

    built = make_package(load_config(options), image=options.image)
    resolved = resolve_parameters(built.spec, built.config, options.parameters)
    check_reach(built.config, resolved)
    if not resolved.get("base_model"):
        require_disk(built.config)
    return built, resolved


def answer_of(options: argparse.Namespace, module: str, *arguments: str) -> dict[str, Any]:
    """Run a Ray job's module on this machine, with the command's config, and return its answer."""
    from pipelines.local import job

    started = job.Job(module, str(options.config.absolute()), arguments, options.overrides)
    return job.answer(started, on_line=print_err, verbose=options.verbose)


@contextlib.contextmanager
def opened_registry(options: argparse.Namespace) -> "Iterator[Store]":
    """Open the registry that the config names, in the configured store or in the home's own. Raises UserError: the home
    has no store, and none is configured; GroundError: the home's store does not start."""
    from components.store.store import Store
    from pipelines.local.local_services import local_services, store_configured

    config = load_config(options)
    if not store_configured() and not (options.home / "store").is_dir():
        raise UserError(
            f"there is no store under {options.home}: give the --home of an earlier `fineloop run`, or set "
            "AWS_ENDPOINT_URL to where your registry lies"
        )
    services = local_services(options.home, bucket=config.registry.bucket, ray=False)
    with services as environment, in_environment(environment):
        yield Store.open(config.registry)


@contextlib.contextmanager
def opened_version(options: argparse.Namespace) -> "Iterator[tuple[Store, Version]]":
    """Open the registry, and find the version in it that the command names."""
    from components.registry.versions import resolve

    with opened_registry(options) as store:
        yield store, resolve(store, options.reference)
