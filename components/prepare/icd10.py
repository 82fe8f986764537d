"""The built-in example, `example://icd10`: sort a medical condition into its ICD-10-CM chapter, release by release.

ICD-10-CM is the list of codes with which hospitals in the United States record diagnoses. Under many codes of its 22
chapters it lists inclusion terms: other names of the condition, often in words that a general model cannot place
("Mpox", "Shiga-Kruse dysentery").

    {"id": "icd10cm/Mpox", "code": "B04",
     "messages": [{"role": "system", "content": "Name the ICD-10 chapter."},
                  {"role": "user", "content": "Mpox"},
                  {"role": "assistant", "content": "Infections"}]}

Each release of the package simple-icd-10-cm holds one release of the list. The installed one is read where it lies, and
older ones from the wheels that `make setup` fetches: only one can be installed. The oldest release is a source of all
its terms, and each later one a source of what it adds or sorts otherwise, as a folder has a file a day. An adapter's
next run reads one release more than its last one did.
"""

import sys
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from components.shared.errors import DataError
from components.shared.protocol import counted

ADDRESS = "example://icd10"
TASK = "Name the ICD-10 chapter."
PACKAGE = "simple-icd-10-cm"
WHEELS = Path(sys.prefix, "share", "fineloop")
"""Where `make setup` puts the wheels of older releases."""
DATES = {"1.0.5": (2021, 1), "1.4.0": (2025, 4), "1.5.0": (2026, 4)}
"""Year and month of the list in each release of the package that has another one."""
CHAPTERS = (
    *("Infections", "Neoplasms", "Blood", "Endocrine", "Mental", "Nerves", "Eye", "Ear", "Circulation", "Respiratory"),
    *("Digestive", "Skin", "Musculoskeletal", "Urogenital", "Pregnancy", "Newborn", "Congenital", "Symptoms", "Injury"),
    *("External causes", "Health status", "Special codes"),
)
"""The chapters' names, from 1 to 22, each of 1 to 3 tokens, so that a small model learns the sorting and not the
spelling."""


@dataclass(frozen=True)
class Release:
    """One release of the list."""

    version: str
    """The package's."""
    path: Path
    """The list itself as XML, or the wheel that holds it."""

    @property
    def date(self) -> datetime:
        return datetime(*DATES.get(self.version, max(DATES.values())), 1, tzinfo=UTC)

    @property
    def address(self) -> str:
        """The name of the source that it is, such as example://icd10/2025-04."""
        return f"{ADDRESS}/{self.date:%Y-%m}"

    @cache  # noqa: B019 - the same few releases, each a second to read, are asked for again and again
    def terms(self) -> dict[str, tuple[str, str]]:
        """Each term's first code and its chapter's name. A term that is listed under several chapters has no single
        answer and is left out."""
        if self.path.suffix == ".whl":
            with zipfile.ZipFile(self.path) as wheel:
                tabular = wheel.read(next(name for name in wheel.namelist() if name.endswith(".xml")))
        else:
            tabular = self.path.read_bytes()
        listed: dict[str, list[tuple[str, str]]] = {}
        for chapter in ElementTree.fromstring(tabular).iter("chapter"):
            answer = CHAPTERS[int(chapter.findtext("name", "")) - 1]
            for entry in chapter.iter():
                code = entry.findtext("name", entry.get("id", ""))
                for note in entry.iterfind("inclusionTerm/note"):
                    listed.setdefault((note.text or "").strip(), []).append((code, answer))
        return {term: places[0] for term, places in listed.items() if len({answer for _, answer in places}) == 1}


def releases() -> list[Release]:
    """The releases that lie here, oldest first; the last is the installed one. Raises DataError: none is installed."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError as exc:
        raise DataError(
            f"data.source is {ADDRESS}, whose data comes with the package {PACKAGE}, which is not installed: "
            "run pip install 'fineloop[local]'"
        ) from exc
    (tabular,) = (Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".xml")
    wheels = [Release(path.name.split("-")[1], path) for path in WHEELS.glob("simple_icd_10_cm-*.whl")]
    older = [release for release in wheels if release.version in DATES and release.version != package.version]
    return [*sorted(older, key=lambda release: release.date), Release(package.version, tabular)]


def arrived(seen: Collection[str]) -> list[Release]:
    """The releases that a run reads, whose adapter has `seen` the sources of these names: one more than so far."""
    here = releases()
    newest = max((place for place, release in enumerate(here) if release.address in seen), default=-1)
    return here[: newest + 2]


def rows(address: str = "") -> Iterator[dict[str, Any]]:
    """Yield the rows of one source, in the order of the list; without an address, all terms of the installed release.
    Raises DataError: that release is not here."""
    here = releases()
    of_address = {release.address: place for place, release in enumerate(here)}
    if address and address not in of_address:
        raise DataError(f"{address} is not on this machine, where {', '.join(of_address)} is: make setup fetches it")
    place = of_address[address] if address else len(here) - 1
    before = here[place - 1].terms() if address and place else {}
    for term, (code, answer) in here[place].terms().items():
        if term not in before or before[term][1] != answer:
            # The term is its own id: it keeps its split when a later release moves it to another code.
            turns = {"system": TASK, "user": term, "assistant": answer}
            messages = [{"role": role, "content": content} for role, content in turns.items()]
            yield {"id": f"icd10cm/{term}", "code": code, "messages": messages}


def news(read: Collection[str]) -> str:
    """A sentence on the newest release among the sources `read`: what it changes, or what is to come."""
    here = releases()
    *older, newest = (release for release in here if release.address in read)
    of = f"ICD-10-CM of {newest.date:%B %Y}"
    if not here[1:]:
        return f"{of}, the installed release alone: make setup fetches older ones"
    if not older:
        return f"{of}, to which the next run adds {here[1].date:%B %Y}'s"
    before, after = older[-1].terms(), newest.terms()
    recoded = sum(before[term][0] != after[term][0] for term in before.keys() & after.keys())
    added, gone = len(after.keys() - before.keys()), len(before.keys() - after.keys())
    return f"{of} has arrived: {counted(added, 'new term')}, {gone} gone, {recoded} under another code"
