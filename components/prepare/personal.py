"""Personal data and secrets in a text: e-mail addresses, phone and card numbers, IBANs, keys and tokens.

Each kind is a pattern with a check that a random text seldom passes: a numbering plan for phone numbers (Google's
library phonenumbers), Luhn's check digit with an issuer's range for cards (ISO/IEC 7812), the remainder modulo 97 and
the country's length for IBANs (ISO 13616), the issuer's prefix and alphabet for secrets. Names of people have no such
pattern: `screen` asks Presidio for them.
"""

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.prepare.dataset import Message, Record
from components.shared.errors import DataError

Kind = Literal["secret", "email", "iban", "card", "phone", "name"]
KINDS: tuple[Kind, ...] = ("secret", "email", "iban", "card", "phone", "name")
"""The kinds by precedence: if two pieces overlap, the earlier kind counts."""


class Span(NamedTuple):
    """A piece of personal data in a text, and its kind."""

    kind: Kind
    start: int
    end: int


EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9_][\w.+%'-]{0,63}@(?!\d+x\.)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b"
)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]){11,30}(?![a-z0-9])")
DIGITS = re.compile(r"\d(?:\D{0,2}\d){6}")
"""The seven digits close to each other that an IBAN, card or phone number has at least."""
CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
# The patterns of secrets, by what a secret begins with.
SECRETS = {
    begin: re.compile(rf"(?<![A-Za-z0-9_-]){pattern}(?![A-Za-z0-9_-])")
    for begin, pattern in {
        "AKIA": r"AKIA[A-Z2-7]{16}",  # Amazon Web Services, access keys
        "ASIA": r"ASIA[A-Z2-7]{16}",
        "gh": r"gh[pousr]_[A-Za-z0-9]{36,251}",  # GitHub
        "github_pat_": r"github_pat_[A-Za-z0-9_]{82}",
        "glpat-": r"glpat-[A-Za-z0-9_-]{20,}",  # GitLab
        "xox": r"xox[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
        "k_live_": r"[sr]k_live_[A-Za-z0-9]{16,}",  # Stripe
        "sk-": r"sk-(?:ant-|proj-|svcacct-|admin-)?[A-Za-z0-9_-]{32,}",  # OpenAI, Anthropic
        "hf_": r"hf_[A-Za-z0-9]{34,}",  # Hugging Face
        "AIza": r"AIza[A-Za-z0-9_-]{35}",  # Google
        "npm_": r"npm_[A-Za-z0-9]{36}",
        "pypi-": r"pypi-[A-Za-z0-9_-]{50,}",
        "dop_v1_": r"dop_v1_[a-f0-9]{64}",  # DigitalOcean
        "SG.": r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",  # SendGrid
    }.items()
}
PRIVATE_KEY = re.compile(
    r"-----BEGIN ((?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?)-----.*?(?:-----END \1-----|\Z)", re.DOTALL
)
JSON_WEB_TOKEN = re.compile(r"(?<![\w-])(eyJ[\w-]{8,})\.[\w-]{4,}\.[\w-]*")
# In RE2's dialect, what every text with personal data has: the beginning of a secret, an @ before a word, or digits.
_HINT = "|".join(
    [
        *(re.escape(begin) for begin in SECRETS if begin not in ("gh", "sk-")),
        *("gh[pousr]_", "sk-[A-Za-z0-9_-]{32}", "-----BEGIN", "eyJ", "@[A-Za-z0-9]"),
        r"\p{Nd}(?:\P{Nd}{0,2}\p{Nd}){6}",
    ]
)
# Countries with the length of their IBANs (ISO 13616), as SWIFT's registry lists them.
_IBANS = (
    "NO15 BE16 DK18 FI18 FK18 FO18 GL18 NL18 SD18 MK19 SI19 AT20 BA20 EE20 KZ20 LT20 LU20 MN20 XK20 CH21 HR21 "
    "LI21 LV21 BG22 BH22 CR22 DE22 GB22 GE22 IE22 ME22 RS22 VA22 AE23 GI23 IL23 IQ23 OM23 SO23 TL23 AD24 CZ24 "
    "ES24 MD24 PK24 RO24 SA24 SE24 SK24 TN24 VG24 LY25 PT25 ST25 IS26 TR26 BI27 DJ27 FR27 GR27 IT27 MC27 MR27 "
    "SM27 AL28 AZ28 BY28 CY28 DO28 GT28 HU28 LB28 NI28 PL28 SV28 BR29 EG29 PS29 QA29 UA29 JO30 KW30 MU30 YE30 "
    "MT31 SC31 LC32 RU33"
)
_IBAN_LENGTH = {length[:2]: int(length[2:]) for length in _IBANS.split()}
# First digits and lengths of the issuers' ranges (ISO/IEC 7812).
_CARD_RANGES = (
    (r"4", {16, 19}),  # Visa; a number of 13 digits is an article's (EAN)
    (r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", {16}),  # Mastercard
    (r"3[47]", {15}),  # American Express
    (r"6011|64[4-9]|65", {16, 17, 18, 19}),  # Discover
    (r"36|38|39|30[0-5]", {14, 16, 17, 18, 19}),  # Diners Club
    (r"35(?:2[89]|[3-8])", {16, 17, 18, 19}),  # JCB
    (r"62|81", {16, 17, 18, 19}),  # UnionPay
    (r"50|5[6-9]|6[037]", {16, 17, 18, 19}),  # Maestro
)


def find(text: str, *, regions: Sequence[str] = ()) -> list[Span]:
    """All personal data in a text except names of people, in order and without overlap.

    `regions` are the countries (ISO 3166, such as DE) whose phone numbers also count without a leading +.
    """
    spans = [
        Span("secret", *match.span())
        for begin, pattern in SECRETS.items()
        if begin in text  # a hundredth of the pattern's cost
        for match in pattern.finditer(text)
    ]
    if "-----BEGIN" in text:
        spans += [Span("secret", *match.span()) for match in PRIVATE_KEY.finditer(text)]
    if "eyJ" in text:
        spans += [Span("secret", *jwt.span()) for jwt in JSON_WEB_TOKEN.finditer(text) if _is_token_header(jwt[1])]
    if "@" in text:
        spans += [Span("email", *match.span()) for match in EMAIL.finditer(text)]
    if not DIGITS.search(text):
        return apart(spans)
    spans += [span for match in IBAN.finditer(text) if (span := _iban(match))]
    spans += [Span("card", *match.span()) for match in CARD.finditer(text) if _is_card(re.sub(r"\D", "", match[0]))]
    return apart([*spans, *_phones(text, regions)])


def mask(text: str, spans: Iterable[Span]) -> str:
    """Replace each piece by its kind in capitals and brackets, such as [EMAIL]."""
    pieces, end = [], 0
    for span in spans:
        pieces += [text[end : span.start], f"[{span.kind.upper()}]"]
        end = span.end
    return "".join([*pieces, text[end:]])


def apart(spans: Iterable[Span]) -> list[Span]:
    """The pieces in order, without overlap: of two that overlap, the one whose kind comes first in KINDS."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (KINDS.index(span.kind), span.start - span.end, span.start)):
        if all(span.end <= other.start or other.end <= span.start for other in kept):
            kept.append(span)
    return sorted(kept, key=lambda span: span.start)


def _iban(match: re.Match[str]) -> Span | None:
    """The start of the match, as long as the country's IBANs are; None if it is no IBAN of that country."""
    length = _IBAN_LENGTH.get(match[0][:2])
    places = [place for place, char in enumerate(match[0]) if char != " "]
    if length is None or len(places) < length:
        return None
    end = places[length - 1] + 1
    if len(places) > length and match[0][end : end + 1] != " ":
        return None  # in the middle of a longer word
    compact = match[0][:end].replace(" ", "")
    digits = "".join(str(int(char, 36)) for char in compact[4:] + compact[:4])
    return Span("iban", match.start(), match.start() + end) if int(digits) % 97 == 1 else None


def _is_card(digits: str) -> bool:
    in_range = any(len(digits) in lengths and re.match(first, digits) for first, lengths in _CARD_RANGES)
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return in_range and len(set(digits)) > 3 and sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _is_token_header(encoded: str) -> bool:
    """Whether it is the header of a JSON Web Token (RFC 7519): an object that names an algorithm."""
    try:
        header = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    except (binascii.Error, ValueError):
        return False
    return isinstance(header, dict) and "alg" in header


def _phones(text: str, regions: Sequence[str]) -> list[Span]:
    searched: list[str | None] = [None] if re.search(r"\+\s?\d", text) else []
    if not searched and not regions:
        return []
    import phonenumbers

    return [
        Span("phone", match.start, match.end)
        for region in [*searched, *regions]
        for match in phonenumbers.PhoneNumberMatcher(text, region, phonenumbers.Leniency.VALID)
    ]


# Screens the messages of a dataset for personal data: counts it, masks it, or leaves out its records.

Action = Literal["report", "mask", "drop"]


class Screen:
    """Looks for personal data in records, and may put each piece's kind in its place."""

    def __init__(self, action: Action = "report", *, regions: Sequence[str] = (), names: bool = False) -> None:
        """`regions` as for `find`; `names` looks for people's names as well. Raises DataError: names are asked for, and
        presidio-analyzer is not installed."""
        self._action, self._regions = action, regions
        self._names = names
        if names:
            _analyzer()

    def suspects(self, records: Mapping[int, Record]) -> list[int]:
        """The keys of the records that may hold any: found in a fraction of the time that `record` takes."""
        if self._names or not records:
            return list(records)
        texts = [[record.answer, *[turn.content for turn in record.prompt]] for record in records.values()]
        starts = np.cumsum([0, *map(len, texts[:-1])])
        together = pa.array([text for of_record in texts for text in of_record], pa.string())
        hints = np.asarray(pc.match_substring_regex(together, _HINT), bool)
        is_suspect = np.logical_or.reduceat(hints, starts).tolist()
        return [
            key
            for (key, record), is_one in zip(records.items(), is_suspect, strict=True)
            if is_one or record.calls or any([turn.more for turn in record.prompt])
        ]

    def record(self, record: Record) -> tuple[Record, Counter[Kind]]:
        """The record as it may be used, and the number of pieces of each kind in it."""
        counts: Counter[Kind] = Counter()

        def text(text: str) -> str:
            spans = find(text, regions=self._regions)
            if self._names:
                names = _analyzer().analyze(text=text, entities=["PERSON"], language="en")
                spans = apart([*spans, *(Span("name", name.start, name.end) for name in names)])
            counts.update(span.kind for span in spans)
            return mask(text, spans) if self._action == "mask" else text

        def of_value(value: Any) -> Any:
            if isinstance(value, str):
                return text(value)
            if isinstance(value, list):
                return [of_value(inner) for inner in value]
            return {key: of_value(inner) for key, inner in value.items()} if isinstance(value, dict) else value

        def of_json(body: str) -> str:
            value = json.loads(body) if body else None
            screened = of_value(value)
            return body if screened == value else json.dumps(screened, ensure_ascii=False, separators=(",", ":"))

        prompt = [Message(turn.role, text(turn.content), of_json(turn.more)) for turn in record.prompt]
        screened = replace(record, prompt=prompt, answer=text(record.answer), calls=of_json(record.calls))
        return screened, counts

    def kept(self, row: str) -> str:
        """The raw text of a row if it may be kept or shown, that is if personal data is only counted; else a notice.

        Raw text may be cut or escaped, so that no pattern would find all of it.
        """
        return row if self._action == "report" else f"[withheld: data.personal is {self._action}]"


@cache
def _analyzer() -> Any:
    """Presidio's, with its own English model, which takes seconds to load."""
    try:
        from presidio_analyzer import AnalyzerEngine
    except ImportError as exc:
        raise DataError(
            "data.personal_names looks for people's names with Presidio, which is not installed: pip install "
            "presidio-analyzer, or remove data.personal_names"
        ) from exc
    return AnalyzerEngine()
