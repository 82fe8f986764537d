"""The chat format of a base: its tokenizer, its chat template, and the tokens that end an answer.

Training, scoring, chat and export all use it, so that a model is prompted as it was trained.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components.config.schema import ModelConfig
from components.config.train import LossOn
from components.prepare.dataset import WEIGHT, Message, Record
from components.registry.versions import Version
from components.shared.errors import ConfigError, DataError, IntegrityError
from ray_jobs.base.base_model import Base

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# For bases that ship no chat template: turns separated by blank lines, the answer after the last one.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}{% endfor %}"
)
BEGIN = "{{ bos_token }}"
"""Prefix of PLAIN_TEMPLATE where the tokenizer begins every text with a BOS token: the base has seen nothing else, and
servers add it too."""
THINK, END_THINK = "<think>", "</think>"
CLOSED = "{% if add_generation_prompt %}{{ '\n</think>\n\n' }}{% endif %}"
"""Appended to a template that always opens a block of reasoning, where no reasoning is wanted."""
SWITCHES = ("enable_thinking", "thinking")
"""The variables by which templates switch reasoning on: in Qwen's and SmolLM's, then in Granite's and DeepSeek's."""
Turn = Mapping[str, Any]
"""A turn as a chat template takes it."""
_TEXT = "0xTEXT"  # a placeholder, to find what the template writes around a text


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with a chat template, and what follows from the two."""

    tokenizer: "PreTrainedTokenizerBase"
    template_from: Literal["base", "fineloop"]
    """Source of the chat template: the base's own, with its block of reasoning closed if need be, or PLAIN_TEMPLATE."""
    end_of_turn: int
    """The token that the template writes after an answer; the tokenizer's EOS token where it writes none."""
    stops: frozenset[int]
    """All tokens that end an answer: the tokenizer's EOS token, those of generation_config.json, and `end_of_turn`."""
    thinking: bool
    """Whether the model is asked to reason before it answers."""
    in_parts: bool = False
    """Whether the template takes a turn's content as a list of texts and images, as those of vision models may do."""

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that are no part of an answer's text. Other special tokens are: a base may use some for its labels."""
        return self.stops | {self.pad}

    def text_of(self, answer: Iterable[int]) -> str:
        text: str = self.tokenizer.decode([int(token) for token in answer if token not in self.ends])
        return text.strip()

    @property
    def begins(self) -> bool:
        return _begins(self.tokenizer)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The rendered prompt for an answer to these turns; empty where the template refuses them."""
        return _shown(self.tokenizer, turns, thinking=self.thinking, in_parts=self.in_parts, add_generation_prompt=True)

    def rows(self, record: Record, loss_on: LossOn = "last") -> list[list[str]]:
        """The record as rows of text, each in pieces: prompt and answer, alternating.

        A row ends with an answer and the text that ends it; before that comes its prompt, as generation will see it.
        With `loss_on` all, every assistant turn after the first user's is an answer, unless its weight is 0: all in one
        row where the template only ever appends, in one row each where it rewrites earlier turns, as reasoning
        templates do.

        Unless the model is asked to think, a block of reasoning is closed before the answer and not part of it. Raises
        DataError: the template refuses the record, or its answer is a block of reasoning with nothing after it.
        """
        rows = [self._asked_and_answered(record, *turns) for turns in self._answers(record, loss_on)]
        joined: list[str] = []
        for prompt, answer in rows:
            before = "".join(joined)
            if not prompt.startswith(before):
                return [list(row) for row in rows]
            joined += [prompt[len(before) :], answer]
        return [joined]

    def ends_early(self, record: Record, loss_on: LossOn = "last") -> bool:
        """Whether a labelled answer contains a stop token in its text: what follows that would be lost."""
        added = self.tokenizer.added_tokens_decoder
        texts = [added[stop].content for stop in self.stops if stop in added]
        earlier = [turn for turn in record.prompt if turn.role == "assistant"] if loss_on == "all" else []
        answers = [*(turn.content for turn in earlier if turn.is_learned), record.answer]
        return any(text in answer for answer in answers for text in texts)

    def _answers(self, record: Record, loss_on: LossOn) -> list[tuple[list[Turn], Turn]]:
        """For each answer: the turns before it, and the answer."""
        self._require_tools_known(record)
        calls = {"tool_calls": json.loads(record.calls)} if record.calls else {}
        answered = {"role": "assistant", "content": record.answer, **calls}
        turns: list[Turn] = [*map(self._asked, record.prompt), answered]
        roles = [*(turn.role if turn.is_learned else "context" for turn in record.prompt), "assistant"]
        places = [place for place, role in enumerate(roles) if role == "assistant" and "user" in roles[:place]]
        places = places[-1:] if loss_on == "last" else places
        return [(turns[:place], self._without_reasoning(record, turns[place])) for place in places]

    def _asked(self, message: Message) -> Turn:
        """An earlier turn, without thinking only what follows its block of reasoning."""
        more = json.loads(message.more) if message.more else {}
        more.pop(WEIGHT, None)  # templates know none
        turn = {"role": message.role, "content": message.content, **more}
        if message.role != "assistant" or self.thinking:
            return turn
        return {**turn, "content": without_reasoning(turn["content"]) or turn["content"]}

    def _without_reasoning(self, record: Record, answered: Turn) -> Turn:
        answer: str = answered["content"] if self.thinking else without_reasoning(answered["content"])
        if not answer and not answered.get("tool_calls"):
            raise DataError(
                f"record {record.id!r} answers with a block of reasoning and nothing after it: leave it out, or train "
                "on the reasoning with model.thinking=true"
            )
        return {**answered, "content": answer}

    def _asked_and_answered(self, record: Record, context: list[Turn], answered: Turn) -> tuple[str, str]:
        texts = []
        for turns, add_generation_prompt in ((context, True), ([*context, answered], False)):
            how: dict[str, Any] = {"thinking": self.thinking, "in_parts": self.in_parts, "tools": record.tools}
            try:
                texts.append(_rendered(self.tokenizer, turns, add_generation_prompt=add_generation_prompt, **how))
            except DataError as exc:
                roles = ", ".join(turn["role"] for turn in turns)
                raise DataError(
                    f"the chat template of model.base refuses record {record.id!r}, with turns of {roles}: {exc}; "
                    "change the record, or take a base whose template knows such turns"
                ) from exc
        prompt, whole = texts
        if unsaid := [turn for turn in context if turn["role"] == "system" and turn["content"].strip() not in prompt]:
            raise DataError(
                f"the chat template of model.base leaves out the system message of record {record.id!r}, "
                f"{unsaid[0]['content'][:40]!r}: put it into the user's turn, or take a base whose template knows one"
            )
        if self.thinking and _opens(prompt) and answered["content"] and END_THINK not in answered["content"]:
            raise DataError(
                f"record {record.id!r} answers without reasoning, and the chat template opens a block of it: put the "
                f"reasoning before the answer, as {THINK}...{END_THINK}, or set model.thinking=false"
            )
        if whole.startswith(prompt):
            return prompt, whole[len(prompt) :]
        if answered.get("tool_calls"):
            raise DataError(
                f"record {record.id!r} answers with tool calls, which the chat template of model.base writes into the "
                "prompt too: it cannot be trained on them"
            )
        # A template that rewrites the turns before an answer gives no common prefix: then the raw answer is used.
        answer: str = answered["content"]
        return prompt, answer.removeprefix(THINK) if _opens(prompt) else answer

    def _require_tools_known(self, record: Record) -> None:
        """Raise DataError if the record uses tools and the template does not: it would silently leave them out."""
        template = str(self.tokenizer.chat_template)
        used = {
            "tools": bool(record.tools),
            "tool_calls": bool(record.calls) or any("tool_calls" in turn.more for turn in record.prompt),
            "tool": any(turn.role == "tool" for turn in record.prompt),
        }
        if unknown := [name for name, is_used in used.items() if is_used and not re.search(rf"\b{name}\b", template)]:
            raise DataError(
                f"record {record.id!r} has {' and '.join(unknown)}, and the chat template of model.base knows none: "
                "take a base whose template does, or write them as text"
            )

    def generation_config(self) -> "GenerationConfig":
        """Greedy decoding to the first stop, without any penalties or banned tokens that a base may ship."""
        from transformers import GenerationConfig

        return GenerationConfig(do_sample=False, eos_token_id=sorted(self.stops), pad_token_id=self.pad)

    def recipe(self) -> dict[str, Any]:
        """The chat format as the lineage records it, as JSON values."""
        template = str(self.tokenizer.chat_template)
        return {
            "template_from": self.template_from,
            "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "template_kwargs": {name: self.thinking for name in SWITCHES if re.search(rf"\b{name}\b", template)},
            "stops": self.tokenizer.convert_ids_to_tokens(sorted(self.stops)),
        }


def of_version(version: Version, folder: Path, base: Base, config: ModelConfig) -> ChatFormat:
    """The chat format of a published version, whose files are in `folder`: that of its base. Whoever wrote those files
    would else choose the words that it is asked and measured in. Raises as `load`; IntegrityError: they hold another
    template than its training has published."""
    chat = load(base, config)
    ours, theirs = str(chat.tokenizer.chat_template), _template_in(folder)
    # A saved template ends its lines as this machine does; an empty file is one that a second writer did not have.
    if theirs and theirs.splitlines() != ours.splitlines():
        was, own = (hashlib.sha256(template.encode()).hexdigest() for template in (theirs, ours))
        raise IntegrityError(
            f"the files of {version.uri} hold a chat template with sha256 {was}, and that of its base {base.reference} "
            f"with model.thinking = {str(config.thinking).lower()} has {own}: train it again"
        )
    return chat


def load(base: Base, config: ModelConfig) -> ChatFormat:
    """Load the base's tokenizer and chat template, or the plain template where it has none. Raises ConfigError: its
    tokenizer has no end-of-sequence token."""
    from transformers import AutoTokenizer

    if base.path.suffix == ".gguf":
        tokenizer = AutoTokenizer.from_pretrained(base.path.parent, gguf_file=base.path.name)
    else:
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=config.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.base {base.reference}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    plain = (BEGIN if _begins(tokenizer) else "") + PLAIN_TEMPLATE
    if not tokenizer.chat_template:
        tokenizer.chat_template = plain
    question = [{"role": "user", "content": _TEXT}]
    prompt = _shown(tokenizer, question, thinking=config.thinking, add_generation_prompt=True)
    if _opens(prompt) and not config.thinking:
        tokenizer.chat_template += CLOSED
    # A template that takes lists of parts silently writes nothing for a plain text.
    in_parts = _TEXT not in prompt and _TEXT in _shown(tokenizer, question, thinking=config.thinking, in_parts=True)
    end_of_turn = _end_of_turn(tokenizer, in_parts=in_parts)
    return ChatFormat(
        tokenizer=tokenizer,
        template_from="fineloop" if tokenizer.chat_template == plain else "base",
        end_of_turn=end_of_turn,
        stops=frozenset({tokenizer.eos_token_id, end_of_turn, *_declared_stops(base.path)}),
        thinking=config.thinking,
        in_parts=in_parts,
    )


def without_reasoning(text: str) -> str:
    """The answer that follows a block of reasoning; empty where the block never ends."""
    if END_THINK in text:
        return text.rpartition(END_THINK)[2].lstrip()
    return "" if text.lstrip().startswith(THINK) else text


def _opens(prompt: str) -> bool:
    return prompt.rstrip().endswith(THINK)


def _rendered(
    tokenizer: Any,
    turns: Sequence[Turn],
    *,
    thinking: bool,
    in_parts: bool = False,
    add_generation_prompt: bool = False,
    tools: str = "",
) -> str:
    """Render turns with the template, in the sandbox of jinja that transformers renders in. `tools` is their JSON.
    Raises DataError: the template does not accept them: jinja's own error, or one that its expressions raised."""
    if in_parts:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(
                turns,
                tools=json.loads(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **dict.fromkeys(SWITCHES, thinking),
            )
        )
    except Exception as exc:  # many types, for turns that the template refuses
        raise DataError(str(exc)) from exc


def _shown(tokenizer: Any, turns: Sequence[Turn], **how: Any) -> str:
    with contextlib.suppress(DataError):
        return _rendered(tokenizer, turns, **how)
    return ""


def _begins(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _end_of_turn(tokenizer: Any, *, in_parts: bool) -> int:
    eos = int(tokenizer.eos_token_id)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _TEXT}]
    text = _shown(tokenizer, turns, thinking=False, in_parts=in_parts)
    after = tokenizer(text.rpartition(_TEXT)[2].lstrip(), add_special_tokens=False)["input_ids"]
    markers = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return int(after[0]) if after and after[0] in markers else eos


def _template_in(folder: Path) -> str | None:
    """The chat template of a saved tokenizer, from chat_template.jinja or tokenizer_config.json; None without one."""
    if (alone := folder / "chat_template.jinja").is_file():
        return alone.read_text(encoding="utf-8")
    if not (settings := folder / "tokenizer_config.json").is_file():
        return None
    saved: dict[str, str | None] = json.loads(settings.read_text(encoding="utf-8"))
    return saved.get("chat_template")


def _declared_stops(folder: Path) -> Iterator[int]:
    """Yield the `eos_token_id` of generation_config.json, or of config.json where that file does not exist."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            declared = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            yield from [] if declared is None else [declared] if isinstance(declared, int) else declared
            return
