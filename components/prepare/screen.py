"""Screens the messages of a dataset for personal data: counts it, masks it, or leaves out its records."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from components.prepare.dataset import Message
from components.prepare.personal import Kind, Span, apart, find, mask, may_hold
from components.shared.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

Action = Literal["report", "mask", "drop"]


class Screen:
    """Looks at the messages of one dataset, counts what it finds, and may put each piece's kind in its place."""

    def __init__(self, action: Action = "report", *, regions: Sequence[str] = (), names: bool = False) -> None:
        """`regions` as for `find`; `names` looks for people's names as well.

        Raises:
            DataError: names are asked for, and presidio-analyzer is not installed.
        """
        self.action = action
        self.found: Counter[Kind] = Counter()
        """Number of pieces of each kind in the records that were screened."""
        self.records = 0
        """Number of records with any of them."""
        self._regions = regions
        self._names = _NameFinder() if names else None
        self._of_record: Counter[Kind] = Counter()

    def begin(self) -> None:
        """Begin another record."""
        self._of_record.clear()

    def message(self, message: Message) -> Message:
        """Count a message's personal data, and return the message as it may be used."""
        return Message(message.role, self.text(message.content), self._of_object(message.more))

    def text(self, text: str) -> str:
        """Count a text's personal data, and return the text as it may be used."""
        spans = find(text, regions=self._regions)
        if self._names is not None:
            spans = apart([*spans, *self._names.find(text)])
        self._of_record.update(span.kind for span in spans)
        return mask(text, spans) if self.action == "mask" else text

    def changes(self, texts: "pa.Array") -> "npt.NDArray[np.bool_]":
        """One flag per text: whether `text` might change or count something in it. Counts nothing itself."""
        import numpy as np

        if self._names is not None:
            return np.ones(len(texts), bool)
        found: npt.NDArray[np.bool_] = np.array(may_hold(texts))
        for place in np.flatnonzero(found).tolist():
            found[place] = bool(find(texts[place].as_py(), regions=self._regions))
        return found

    def kept(self, row: str) -> str:
        """The raw text of a row if it may be kept or shown, that is if personal data is only counted; else a notice.

        Raw text may be cut or escaped, so that no pattern would find all of it.
        """
        return row if self.action == "report" else f"[withheld: data.personal is {self.action}]"

    def end(self) -> bool:
        """Count the record, and return whether it may be used."""
        self.found += self._of_record
        self.records += bool(self._of_record)
        return self.action != "drop" or not self._of_record

    def taken(self) -> tuple[Counter[Kind], int]:
        """Return the counts since the last call: pieces of each kind, and records that hold any."""
        found = self.found, self.records
        self.found, self.records = Counter(), 0
        return found

    def _of_object(self, more: str) -> str:
        """The JSON with its texts as they may be used."""
        if not more:
            return more
        value = json.loads(more)
        screened = self._of_value(value)
        return more if screened == value else json.dumps(screened, ensure_ascii=False, separators=(",", ":"))

    def _of_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self._of_value(each) for each in value]
        return {key: self._of_value(each) for key, each in value.items()} if isinstance(value, dict) else value


@cache
def _only_one(engine: Callable[[], Any]) -> Any:
    """Create the engine once per process: its model takes seconds to load."""
    return engine()


class _NameFinder:
    """Finds people's names with Presidio's own English model."""

    def __init__(self) -> None:
        try:
            from presidio_analyzer import AnalyzerEngine
        except ImportError as exc:
            raise DataError(
                "data.personal_names looks for people's names with Presidio, which is not installed: pip install "
                "presidio-analyzer, or remove data.personal_names"
            ) from exc
        self._analyzer = _only_one(AnalyzerEngine)

    def find(self, text: str) -> list[Span]:
        found = self._analyzer.analyze(text=text, entities=["PERSON"], language="en")
        return [Span("name", each.start, each.end) for each in found]
