"""Chat with an adapter: `fineloop chat NAME`. The adapter answers first, then the model that it is compared with."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig
from components.prepare.dataset import Message
from components.registry.versions import resolve
from components.shared import garbage
from components.store.store import Store
from ray_jobs import entry

if TYPE_CHECKING:
    from ray_jobs.talking.speaker import Speaker

INTERRUPTED = 130
SHOWN = 8  # digits of a version id
HELP = """/reset   begin a new conversation
/help    this list
Ctrl-C ends an answer, Ctrl-D the chat"""


def main() -> None:
    """The entry point. Reads one prompt per line from stdin until it ends."""
    parser = entry.parser(
        "ray_jobs.chat",
        "Answer prompts from stdin with an adapter, and with its base or another version beside it.",
        "fineloop chat icd10-chapters@production",
    )
    parser.add_argument("--version", required=True, help="NAME, NAME@ALIAS or NAME@VERSION")
    parser.add_argument("--against", default="base", help="base, none, or NAME@VERSION")
    parser.add_argument("--system", help="a system message before each conversation (default: that of the records)")
    parser.add_argument("--turns", choices=("keep", "alone"), help="whether a prompt follows those before it")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: evaluate.max_new_tokens, or 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, as evaluation decodes")
    parser.add_argument("--transcript", type=Path, help="file to add each turn to, a JSON object a line")
    arguments = parser.parse_args()
    answering = Answering(arguments.max_tokens, arguments.temperature)
    try:
        with entry.for_people():
            config = entry.load_config(arguments.config, arguments.set)
            _chat(config, arguments, answering)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@dataclass(frozen=True)
class Answering:
    """Maximum length and decoding of answers."""

    max_tokens: int | None = None
    """Maximum number of tokens in an answer; None means evaluate.max_new_tokens, or 256."""
    temperature: float = 0.0


@dataclass
class Conversation:
    """The messages to and from one speaker."""

    speaker: "Speaker"
    turns: list[Message] = field(default_factory=list)


def _chat(config: RunConfig, arguments: argparse.Namespace, answering: Answering) -> None:
    """Answer prompts until stdin ends. Base, context and format are those of the version's own run; what --system and
    --turns leave open follows the version's training data."""
    with garbage.importing():
        from ray_jobs.talking import speaker

    store = Store.open(config.registry)
    version = resolve(store, arguments.version)
    trained = speaker.as_trained(config, store, version)
    system = trained.system if arguments.system is None else arguments.system
    keeps_turns = trained.in_turns if arguments.turns is None else arguments.turns == "keep"
    speakers = speaker.load(config, store, version, version.name, with_base=arguments.against == "base")
    if arguments.against not in ("base", "none"):
        other = resolve(store, arguments.against)
        speakers += speaker.load(config, store, other, f"{other.name}@{other.version[:SHOWN]}", with_base=False)
    if system:
        entry.print_err(f"each conversation begins with the system message {system!r}")
    if not keeps_turns:
        entry.print_err("each prompt stands alone, without those before it: --turns keep makes a conversation of them")
    entry.print_err("ready: type a prompt, /help, or Ctrl-D to end")
    begun = [Message("system", system)] if system else []
    for turn in converse(speakers, _prompts(), begun, answering, keeps_turns=keeps_turns, say=_say):
        if arguments.transcript is not None:
            with arguments.transcript.open("a", encoding="utf-8") as file:
                file.write(json.dumps(turn) + "\n")


def converse(
    speakers: Sequence["Speaker"],
    prompts: Iterator[str],
    begun: Sequence[Message],
    answering: Answering,
    *,
    keeps_turns: bool,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yield each prompt with every speaker's answer; each speaker has its own conversation, which starts as `begun`."""
    talks = [Conversation(speaker, [*begun]) for speaker in speakers]
    for prompt in prompts:
        if prompt == "/help":
            entry.print_err(HELP)
            continue
        if prompt == "/reset" or not keeps_turns:
            talks = [Conversation(speaker, [*begun]) for speaker in speakers]
        if prompt == "/reset":
            entry.print_err("a new conversation")
            continue
        yield {"prompt": prompt, "answers": [_answer(talk, prompt, answering, say) for talk in talks]}


def _answer(talk: Conversation, prompt: str, answering: Answering, say: Callable[[str], None]) -> dict[str, Any]:
    """Stream an answer to the output; an interrupt ends the answer where it is."""
    from ray_jobs.text.chat_format import without_reasoning

    talk.turns.append(Message("user", prompt))
    pieces: list[str] = []

    def hear(text: str) -> None:
        pieces.append(text)
        say(text)

    stopped = False
    try:
        say(f"{talk.speaker.name:>24} | ")
        talk.speaker.answer(
            talk.turns, on_text=hear, max_tokens=answering.max_tokens, temperature=answering.temperature
        )
    except KeyboardInterrupt:
        stopped = True
    say(" [stopped]\n" if stopped else "\n")
    text = "".join(pieces)
    talk.turns.append(Message("assistant", without_reasoning(text)))
    return {"model": talk.speaker.name, "text": text, "stopped": stopped}


def _prompts() -> Iterator[str]:
    """The non-empty lines of stdin. Two interrupts in a row end them, as the end of stdin does."""
    asked = False
    while True:
        entry.print_err("> ", end="")
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            if asked:
                return
            asked = True
            entry.print_err("\nCtrl-C again, or Ctrl-D, ends the chat")
            continue
        asked = False
        if not line:
            return
        if line.strip():
            yield line.strip()


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
