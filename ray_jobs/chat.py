"""Chat with an adapter: `fineloop chat NAME`. The adapter answers first, then its base."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
HELP = """/reset   begin a new conversation
/help    this list
Ctrl-C ends an answer, Ctrl-D the chat"""


def main() -> None:
    """The entry point. Reads one prompt per line from stdin until it ends."""
    parser = entry.parser("ray_jobs.chat", __doc__)
    parser.add_argument("--version", required=True, help="NAME, NAME@ALIAS or NAME@VERSION")
    parser.add_argument("--against", default="base", choices=("base", "none"), help="what answers beside it")
    parser.add_argument("--system", help="a system message before each conversation (default: that of the records)")
    parser.add_argument("--turns", choices=("keep", "alone"), help="whether a prompt follows those before it")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: evaluate.max_new_tokens, or 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, as evaluation decodes")
    parser.add_argument("--transcript", type=Path, help="file to add each turn to, a JSON object a line")
    arguments = parser.parse_args()
    try:
        with entry.for_people():
            _chat(entry.load_config(arguments.config, arguments.set), arguments)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _chat(config: RunConfig, arguments: argparse.Namespace) -> None:
    """Answer prompts until stdin ends. Base, context and format are those of the version's own run; what --system and
    --turns leave open follows the version's training data."""
    with garbage.importing():
        from ray_jobs.talking import speaker

    store = Store.open(config.registry)
    version = resolve(store, arguments.version)
    speakers = speaker.load(config, store, version, version.name, with_base=arguments.against == "base")
    trained = speaker.as_trained(config, store, version)
    system = trained.system if arguments.system is None else arguments.system
    keeps_turns = trained.in_turns if arguments.turns is None else arguments.turns == "keep"
    if system:
        entry.print_err(f"each conversation begins with the system message {system!r}")
    if not keeps_turns:
        entry.print_err("each prompt stands alone, without those before it: --turns keep makes a conversation of them")
    entry.print_err("ready: type a prompt, /help, or Ctrl-D to end")
    begun = [Message("system", system)] if system else []
    how = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    for turn in converse(speakers, _prompts(), begun, keeps_turns=keeps_turns, say=_say, **how):
        if arguments.transcript is not None:
            with arguments.transcript.open("a", encoding="utf-8") as file:
                file.write(json.dumps(turn) + "\n")


def converse(
    speakers: Sequence["Speaker"],
    prompts: Iterator[str],
    begun: Sequence[Message],
    *,
    keeps_turns: bool,
    say: Callable[[str], None],
    **how: Any,
) -> Iterator[dict[str, Any]]:
    """Yield each prompt with every speaker's answer; each speaker has its own conversation, which starts as `begun`.
    `how` are `Speaker.answer`'s other arguments."""
    conversations: list[list[Message]] = [[*begun] for _ in speakers]
    for prompt in prompts:
        if prompt == "/help":
            entry.print_err(HELP)
            continue
        if prompt == "/reset" or not keeps_turns:
            conversations = [[*begun] for _ in speakers]
        if prompt == "/reset":
            entry.print_err("a new conversation")
            continue
        talks = zip(speakers, conversations, strict=True)
        yield {"prompt": prompt, "answers": [_answer(speaker, turns, prompt, say, how) for speaker, turns in talks]}


def _answer(
    speaker: "Speaker", turns: list[Message], prompt: str, say: Callable[[str], None], how: Mapping[str, Any]
) -> dict[str, Any]:
    """Stream an answer to the output; an interrupt ends the answer where it is."""
    from ray_jobs.text.chat_format import without_reasoning

    turns.append(Message("user", prompt))
    pieces: list[str] = []

    def hear(text: str) -> None:
        pieces.append(text)
        say(text)

    stopped = False
    try:
        say(f"{speaker.name:>24} | ")
        speaker.answer(turns, on_text=hear, **how)
    except KeyboardInterrupt:
        stopped = True
    say(" [stopped]\n" if stopped else "\n")
    text = "".join(pieces)
    turns.append(Message("assistant", without_reasoning(text)))
    return {"model": speaker.name, "text": text, "stopped": stopped}


def _prompts() -> Iterator[str]:
    """The non-empty lines of stdin. Two interrupts in a row end them, as the end of stdin does."""
    interrupted = False
    while True:
        entry.print_err("> ", end="")
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            entry.print_err("\nCtrl-C again, or Ctrl-D, ends the chat")
            continue
        interrupted = False
        if not line:
            return
        if line.strip():
            yield line.strip()


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
