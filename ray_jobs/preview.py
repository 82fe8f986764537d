"""Preview what a run would make of its data: `python -m ray_jobs.preview --config FILE`.

Reads the data as the prepare step does and writes nothing. Of the base, only the tokenizer is needed. The last line of
stdout is one JSON object; `fineloop data` formats it for the terminal.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.prepare.power import power
from components.prepare.prepare import percentiles, preview
from components.prepare.sources import find_sources
from components.prepare.split import judges_of, lacking
from components.shared import garbage
from components.shared.errors import StoreError, UserError
from components.shared.protocol import say

with garbage.importing():
    from ray_jobs import entry
    from ray_jobs.base import base_model
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import TokenizedSplit, tokenize
    from ray_jobs.text.chat_format import ChatFormat

STEP = "data"
SHOWN = 3
SAMPLED = 2000
"""Number of records that are tokenised; they are a random sample, as records are in the order of a hash."""


def main() -> None:
    """Run the job of this command line, and exit with its code."""
    parser = entry.parser("ray_jobs.preview", __doc__)
    entry.main(STEP, parser, lambda config, _: print(json.dumps(previewed(config)), flush=True))  # noqa: T201 - the answer


def previewed(config: RunConfig) -> dict[str, Any]:
    """The data's profile, the records that the gate could decide by, and some records as the base reads them. Raises
    DataError: as in `prepare`: a run would stop there."""
    sources = find_sources(config.data.source)
    say(STEP, f"reading {', '.join(source.name for source in sources)}")
    with preview(config, sources) as (profile, parts):
        reserved = profile.get("logged", {}).get("reserved", 0)
        gate = _gate(config, list(parts.evaluation), reserved)
        train = parts.train.head(SAMPLED)
    body: dict[str, Any] = {
        **{"profile": profile, "gate": gate, "base": config.model.base, "unread_because": ""},
        **{"tokens": None, "positions": None, "shown": []},
        "refused": gate["lacking"],
    }
    try:
        base = base_model.Base(config.model.base, base_model.locate(config.model), {})
        shape = base_model.load_config(base.path, config.model)
        chat = chat_format.load(base, config.model)
    except (UserError, StoreError) as exc:
        return {**body, "unread_because": str(exc)}
    config = base_model.fitted(config, shape, lambda line: say(STEP, line))
    say(STEP, f"tokenising {len(train)} records as {config.model.base} reads them")
    tokens = _tokens(config, train, chat)
    return {
        **body,
        "positions": base_model.positions(shape),
        "tokens": tokens,
        "refused": body["refused"] or _too_long(config, tokens),
        "shown": _shown(config, train, chat),
    }


def _gate(config: RunConfig, held_out: Sequence[Record], reserved: int) -> dict[str, Any]:
    """The number of records for the first decision, what is lacking for it, and what they tell of the next ones."""
    judging = judges_of(held_out, config)
    used = max(config.evaluate.records, config.evaluate.max_records)
    return {
        "records": min(used, len(judging.records)),
        "independent": judging.num_independent(used),
        "confidence": config.gate.confidence,
        "lacking": lacking(judging, config, reserved=reserved),
        "power": power(judging, config),
    }


def _tokens(config: RunConfig, records: Sequence[Record], chat: ChatFormat) -> dict[str, Any]:
    """Lengths of whole records in tokens, and how many do not fit model.max_length."""
    whole = tokenize(records, chat, sys.maxsize, config.data.loss_on)
    fits = whole.lengths.max(initial=0) <= config.model.max_length
    split = whole if fits else tokenize(records, chat, config.model.max_length, config.data.loss_on)
    return {
        "records": len(records),
        "length": percentiles(Counter(whole.lengths.tolist())) if len(whole) else None,
        "trained": percentiles(Counter(whole.num_answer_tokens.tolist())) if len(whole) else None,
        "max_length": config.model.max_length,
        "cut": len(split.cut),
        "cut_system": len(split.cut_system),
        "too_long": len(split.too_long),
    }


def _too_long(config: RunConfig, tokens: Mapping[str, Any]) -> str:
    """Why a training would stop at the records that do not fit, judging by these; empty where it would not."""
    records, allowed, limit = tokens["records"], config.data.max_reject_share, config.model.max_length
    if max(tokens["too_long"], tokens["cut"]) <= allowed * records:
        return ""
    return (
        f"of {records:,} records {tokens['too_long']:,} do not fit model.max_length {limit:,}, and {tokens['cut']:,} "
        f"would be shortened, which is more than data.max_reject_share = {allowed:g} allows: raise either"
    )


def _shown(config: RunConfig, records: Sequence[Record], chat: ChatFormat) -> list[dict[str, Any]]:
    """The first records as training reads them, split into pieces of text with and without labels."""
    split = tokenize(records[:SHOWN], chat, config.model.max_length, config.data.loss_on)
    rows = zip(split.ids, pairwise(split.offsets.tolist()), strict=True)
    return [{"id": name, "pieces": list(_pieces(split, *bounds, chat))} for name, bounds in rows]


def _pieces(split: TokenizedSplit, start: int, end: int, chat: ChatFormat) -> Iterator[dict[str, Any]]:
    """A row's text, split where its labels begin or end."""
    labelled = split.labelled[start:end].tolist()
    cuts = [0, *(place for place in range(1, len(labelled)) if labelled[place] != labelled[place - 1]), len(labelled)]
    before = ""
    for first, last in pairwise(cuts):
        # Decode everything up to here: the text of a token may depend on the tokens before it.
        text = chat.tokenizer.decode(split.tokens[start : start + last].tolist())
        yield {"text": text[len(before) :], "trained": labelled[first]}
        before = text


if __name__ == "__main__":
    main()
