"""Talk to an adapter: `fineloop chat NAME`. Base and adapter answer side by side, from one base in memory."""

import logging
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.registry.versions import pull_version, resolve
from components.shared import garbage
from components.shared.errors import FineloopError
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import build, recorded
from ray_jobs.base import base_config, base_model
from ray_jobs.text import chat_format
from ray_jobs.text.chat_format import ChatFormat

if TYPE_CHECKING:
    from ray_jobs.kernels.door import Kernels

LONGEST_ANSWER = 256  # tokens, where the run's config sets no length


def main() -> None:
    """The entry point. Reads one prompt a line from stdin until it ends."""
    parser = entry.parser(
        "ray_jobs.chat",
        "Answer prompts from stdin with the base and with an adapter, side by side.",
        "fineloop chat icd10-chapters@production",
    )
    parser.add_argument("--version", required=True, help="NAME, NAME@ALIAS or NAME@VERSION")
    parser.add_argument(
        "--system", help="a system message before each prompt; without it, the one that every record had"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the adapter's copy is removed
    # What takes long is announced, such as converting a base that is here for the first time.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ray_jobs").setLevel(logging.INFO)
    _print_err("starting PyTorch and transformers")
    entry.quiet_libraries()
    try:
        chat(entry.load_config(arguments.config, arguments.set), arguments.version, arguments.system)
    except FineloopError as exc:  # a person reads this, not a submitter
        _print_err(f"fineloop: {exc}")
        sys.exit(exc.exit_code)


def chat(config: RunConfig, reference: str, system: str | None) -> None:
    """Answer until stdin ends. The base, its context and its format are those of the version's own run.

    Raises:
        ObjectMissing: there is no such version.
        ConfigError: its base comes with code that `config` does not allow to run.
        IntegrityError: its base is not there any more as it was trained on.
    """
    with garbage.importing():
        from ray_jobs.adapters import own_base
        from ray_jobs.kernels import door
        from ray_jobs.planning import placement

    store = Store.open(config.registry)
    version = resolve(store, reference)
    its_run = recorded.read(config, store, version)
    own, longest = its_run.config, its_run.max_new_tokens or LONGEST_ANSWER
    if system is None:
        system = _system_message(store, its_run.dataset_uri)
    _print_err(f"loading {own.model.base}")
    base = base_model.resolve(own.model, recorded=its_run.base_identity)
    stands_on = own_base.find(own, base, store)
    use_gpu = placement.on_gpus(own, base)
    kernels = door.choose(config, base_config.load(base.path, own.model), on_gpu=use_gpu)
    model = _load(stands_on, own, kernels, use_gpu=use_gpu)
    alone = model if stands_on == base else _load(base, own, kernels, use_gpu=use_gpu)
    _print_err(f"loading {version.name} {version.version}")
    with tempfile.TemporaryDirectory(prefix="fineloop-chat-") as scratch:
        folder = Path(scratch) / "adapter"
        pull_version(store, version, folder)
        chat_as = chat_format.load(base, own.model, folder)
        adapted = kernels.adopt(build.load(model, folder)).eval()
    for each in (alone, adapted):
        door.adopt_single_rows(each)
    if system:
        _print_err(f"each prompt follows the system message {system!r}, as in training")
    _print_err("ready: type a prompt, or Ctrl-D to end")
    while prompt := _read():
        turns = [*([Message("system", system)] if system else []), Message("user", prompt)]
        with adapted.disable_adapter():
            _answer("base", alone, chat_as, turns, own, longest)
        _answer(version.name, adapted, chat_as, turns, own, longest)


def _load(base: base_model.Base, own: RunConfig, kernels: "Kernels", *, use_gpu: bool) -> Any:
    from ray_jobs.kernels import door

    model = door.load_model(base, own.model, own.method.row.base, kernels, use_gpu=use_gpu, across_gpus=True).eval()
    kernels.hold_dense_if_room(model)
    return model


def _system_message(store: Store, dataset_uri: str) -> str:
    """What every record of the training data began with; empty when they differ or the dataset is gone."""
    key = f"{store.key(dataset_uri).rstrip('/')}/profile.json"
    return (store.get_json(key).get("system_message") or "") if store.exists(key) else ""


def _answer(who: str, model: Any, chat_as: ChatFormat, turns: list[Message], config: RunConfig, longest: int) -> None:
    """Say an answer word by word, as it comes."""
    from ray_jobs.scoring.generation import greedy
    from ray_jobs.text.batching import tokenize

    # An answer is needed to make a record; generation sees the prompt alone.
    split = tokenize([Record("prompt", turns, "-")], chat_as, config.model.max_length)
    _say(f"{who:>24} | ")
    greedy(model, chat_as, split, 1, longest, on_text=_say)
    _say("\n")


def _read() -> str:
    while True:
        _print_err("> ", end="")
        line = sys.stdin.readline()
        if not line or line.strip():
            return line.strip()


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_err(text: str, end: str = "\n") -> None:
    sys.stderr.write(text + end)
    sys.stderr.flush()


if __name__ == "__main__":
    main()
