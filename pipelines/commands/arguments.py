"""Arguments that many commands share, the values parsed from them, and what commands print."""

import argparse
import contextlib
import difflib
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from components.shared.errors import UserError
from components.shared.machine import in_environment
from components.shared.protocol import printable
from pipelines.configs import DEFAULT_CONFIG

if TYPE_CHECKING:
    from components.config.schema import RunConfig
    from components.store.store import Store
    from pipelines.kubeflow.client import Kubeflow
    from pipelines.kubeflow.compile import Package

HELP_WIDTH = 88
EXIT_CODES = """exit codes:
  0  done; for a run: completed, whether the candidate was promoted or held
  2  the input is wrong (config, data, arguments), said in one message
  1  anything else failed"""


class Parser(argparse.ArgumentParser):
    """Parser that suggests a command for a mistyped one, and may have subcommands (verbs) beside its own arguments."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.verbs: dict[str, Parser] = {}
        self.words: list[str] = []

    def add_parser(self, name: str, *, help: str, **options: Any) -> "Parser":
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
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(wrong[1], re.findall(r"[\w-]+", wrong[2]), n=1)
            message += "".join(f": did you mean {each}?" for each in near)
        elif unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message += "".join(f": did you mean {each}?" for each in near)
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


Command = Callable[[argparse.Namespace], Answer]


def add_group(commands: Any, name: str, *, does: str, more: str, example: str) -> Any:
    """Add a group of commands with its help; returns what its commands are added to."""
    group = commands.add_parser(
        name,
        help=does,
        description=more,
        epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return group.add_subparsers(metavar="COMMAND", required=True)


def add_command(
    commands: Any,
    name: str,
    command: Command,
    *,
    does: str,
    more: str = "",
    example: str,
    is_listed: bool = True,
    opens_registry: bool = False,
) -> argparse.ArgumentParser:
    """Add a command with its help: a sentence, an example, its exit codes, and the options that all commands take.

    If it is not `is_listed`, it is left out of the list of commands, as argparse does with what has no help. If it
    `opens_registry`, it takes a config and --home as well.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        **({"help": does[:1].lower() + does[1:].rstrip(".")} if is_listed else {}),
        description=textwrap.fill(f"{does} {more}".strip(), HELP_WIDTH),
        epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=command, parser=parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="print everything that happens, on stderr")
    if opens_registry:
        add_config(parser)
        add_home(parser)
    return parser


def add_home(parser: argparse.ArgumentParser) -> None:
    """Add --home, the folder of the local store, the Ray head and the runs' logs."""
    parser.add_argument(
        "--home",
        type=Path,
        default=Path(".fineloop"),
        metavar="DIR",
        help="where this machine's store, logs and reports lie (default: ./.fineloop)",
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add --config, and --set for single keys of it."""
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="TOML config (default: the built-in example, pipelines/configs/icd10.toml)",
    )
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add --set, which replaces single keys of the config."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="replace one key, such as train.learning_rate=2e-4; may be repeated",
    )


def add_note(parser: argparse.ArgumentParser) -> None:
    """Add --note, the purpose of the run; it is stored in the config."""
    parser.add_argument(
        "--note",
        action="append",
        default=[],
        dest="overrides",
        type=lambda text: f"adapter.note={json.dumps(text, ensure_ascii=False)}",
        metavar="TEXT",
        help="what this run is for, shown in its report and in lists of runs (adapter.note)",
    )


def load_config(options: argparse.Namespace) -> "RunConfig":
    """Return the validated config with its relative paths made absolute, because steps run in other folders.

    Raises:
        ConfigError: the file is missing, or it or an override is wrong.
    """
    from components.config import config_file

    _take_own_data(options)
    config = config_file.load(options.config, options.overrides)
    here = Path.cwd()
    sources = [config.data.source] if isinstance(config.data.source, str) else config.data.source
    absolute = [source if "://" in source else str(here / Path(source).expanduser()) for source in sources]
    source = absolute[0] if isinstance(config.data.source, str) else absolute
    base = config.model.base
    if "://" not in base and (here / Path(base).expanduser()).is_dir():  # else it is a hub id
        base = str(here / Path(base).expanduser())
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"source": source}),
            "model": config.model.model_copy(update={"base": base}),
        }
    )


def _take_own_data(options: argparse.Namespace) -> None:
    """Make DATA of the command line an override; in the example's config, also what else the example says of its own.

    Other data in the example's config are used whole, and DATA gives the adapter its name, unless --set says otherwise.
    """
    data, own = vars(options).pop("data", None), []
    if data:
        options.overrides = [*options.overrides, f"data.source={json.dumps(data, ensure_ascii=False)}"]
    if options.config == DEFAULT_CONFIG:
        overridden = {override.partition("=")[0].strip() for override in options.overrides}
        if data:
            own.append(("adapter.name", name_from(data)))
        if "data.source" in overridden:
            own.append(("data.max_records", "0"))
        own = [(key, value) for key, value in own if key not in overridden]
    options.overrides = [*(f"{key}={value}" for key, value in own), *options.overrides]


def name_from(source: str) -> str:
    """Return a registry name made from the file's name."""
    stem = Path(source.rstrip("/")).name.partition(".")[0]
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63] or "adapter"


def home_option(options: argparse.Namespace) -> str:
    """Return the --home option to append to a suggested command; empty for the default home."""
    default = options.home == Path(".fineloop")
    return "" if default else f" --home {shlex.quote(str(options.home))}"


def print_err(text: str, end: str = "\n") -> None:
    """Print progress, a warning or an error on stderr; stdout is for the answer."""
    print(printable(text), file=sys.stderr, end=end, flush=True)  # noqa: T201 - the screen, beside the answer


# Format rows as a text table.


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align the rows in columns, each as wide as its widest cell; the last column is not padded."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=True)), row[-1]])
        for row in rows
    )


# Arguments that the commands for Kubeflow share, and the values parsed from them.

SERVICE_ACCOUNT = "fineloop-pipeline"
EXPERIMENT = "fineloop"


def add_kubeflow(parser: argparse.ArgumentParser) -> None:
    """Add the server's address and the user's namespace on it."""
    parser.add_argument(
        "--host",
        default="",
        metavar="URL",
        help="Kubeflow Pipelines (default: KFP_ENDPOINT, the pod's, the kubeconfig's)",
    )
    parser.add_argument(
        "--namespace",
        default="",
        metavar="NAME",
        help="your namespace on a multi-user Kubeflow (default: KFP_NAMESPACE)",
    )


def add_pipeline(parser: argparse.ArgumentParser, *, keeps: bool = False) -> None:
    """Add the pipeline's image, parameters and service account. With `keeps`, those omitted stay as they are."""
    parser.add_argument("--image", default="", metavar="IMAGE", help="image of every step, pinned by digest")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        dest="parameters",
        metavar="NAME=VALUE",
        help="another parameter of the pipeline; may be repeated",
    )
    default = "as it is" if keeps else SERVICE_ACCOUNT
    parser.add_argument(
        "--service-account",
        default=None if keeps else SERVICE_ACCOUNT,
        metavar="NAME",
        help=f"Kubernetes account of the steps (default: {default}; '' means the server's)",
    )


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add --experiment, the group in which Kubeflow shows the runs."""
    parser.add_argument(
        "--experiment", default=EXPERIMENT, metavar="NAME", help=f"group of runs in the UI (default: {EXPERIMENT})"
    )


def connected(options: argparse.Namespace) -> "Kubeflow":
    """Connect to the server that the options or the environment name."""
    from pipelines.kubeflow.client import connect

    return connect(os.environ, host=options.host, namespace=options.namespace)


def prepared(options: argparse.Namespace) -> "tuple[Package, dict[str, Any]]":
    """Compile the pipeline and resolve its parameters; both are checked before any request to Kubeflow."""
    from pipelines.kubeflow.compile import check_reach, make_package, resolve_parameters

    built = make_package(load_config(options), image=options.image)
    resolved = resolve_parameters(built.spec, built.config, options.parameters)
    check_reach(built.config, resolved)
    return built, resolved


# The registry, opened for one command.


@contextlib.contextmanager
def opened_registry(options: argparse.Namespace) -> Iterator["Store"]:
    """Open the registry that the config names, in the configured store or in the home's own.

    Raises:
        UserError: the home has no store, and none is configured.
        GroundError: the home's store does not start.
    """
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
