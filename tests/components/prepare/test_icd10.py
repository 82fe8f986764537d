"""The example's releases: what each adds, and which one a run reads."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from components.config.schema import RunConfig
from components.prepare import icd10
from components.prepare.prepare import prepare_if_new
from components.registry import between_runs
from components.shared.errors import DataError
from components.step.step import StepRun
from components.store.store import Store

OLD, NEW, NEWEST = "example://icd10/2021-01", "example://icd10/2025-04", "example://icd10/2026-04"
ONE, OTHER = "Classical cholera", "Mpox"  # which the installed list has


def wheel(folder: Path, version: str, chapters: dict[str, dict[str, list[str]]]) -> None:
    """A wheel of this release with these terms by code and chapter, in the form of the list."""
    of_codes = {
        number: "".join(
            f"<diag><name>{code}</name><desc>d</desc><inclusionTerm>"
            f"{''.join(f'<note>{term}</note>' for term in terms)}</inclusionTerm></diag>"
            for code, terms in codes.items()
        )
        for number, codes in chapters.items()
    }
    listed = "".join(f"<chapter><name>{number}</name>{codes}</chapter>" for number, codes in of_codes.items())
    with zipfile.ZipFile(folder / f"simple_icd_10_cm-{version}-py3-none-any.whl", "w") as packed:
        packed.writestr("simple_icd_10_cm/data/tabular.xml", f"<ICD10CM.tabular>{listed}</ICD10CM.tabular>")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(icd10, "WHEELS", tmp_path)
    return tmp_path


def terms(address: str = "") -> dict[str, str]:
    return {row["messages"][1]["content"]: row["messages"][2]["content"] for row in icd10.rows(address)}


@pytest.mark.slow
def test_the_installed_list_reads_as_its_own_package_reads_it() -> None:
    reading = (
        "import json, simple_icd_10_cm as icd\nfound, chapter = {}, ''\n"
        "for code in icd.get_all_codes():\n    chapter = code if icd.is_chapter(code) else chapter\n"
        "    for term in icd.get_inclusion_term(code):\n        found.setdefault(term, [code, set()])[1].add(chapter)\n"
        "print(json.dumps({term: [code, *of] for term, (code, of) in found.items() if len(of) == 1}))"
    )
    theirs = json.loads(subprocess.check_output([sys.executable, "-c", reading], text=True))
    ours = {row["messages"][1]["content"]: (row["code"], row["messages"][2]["content"]) for row in icd10.rows()}
    assert ours == {term: (code, icd10.CHAPTERS[int(chapter) - 1]) for term, (code, chapter) in theirs.items()}
    assert len(ours) > 12_000


def test_a_term_under_two_chapters_is_left_out(wheels: Path) -> None:
    wheel(wheels, "1.0.5", {"2": {"C1": ["a", "b"]}, "14": {"N1": ["b", "c"]}})
    found = {row["id"]: (row["code"], row["messages"][2]["content"]) for row in icd10.rows(OLD)}
    assert found == {"icd10cm/a": ("C1", "Neoplasms"), "icd10cm/c": ("N1", "Urogenital")}


def test_a_later_release_holds_what_is_new_or_sorted_otherwise(wheels: Path) -> None:
    wheel(wheels, "1.0.5", {"1": {"A1": ["stays", "moves", "goes"]}, "2": {"C1": ["code"]}})
    wheel(wheels, "1.4.0", {"1": {"A1": ["stays"]}, "2": {"C1": ["moves", "comes"], "C2": ["code"]}})
    assert terms(OLD).keys() == {"stays", "moves", "goes", "code"}
    assert terms(NEW) == {"moves": "Neoplasms", "comes": "Neoplasms"}
    assert icd10.news([OLD, NEW]) == ("ICD-10-CM of April 2025 has arrived: 1 new term, 1 gone, 2 under another code")


def test_each_run_reads_one_release_more_than_the_last_that_decided(
    wheels: Path, store: Store, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [f"term {number}" for number in range(40)]
    wheel(wheels, "1.0.5", {"1": {"A1": [ONE, OTHER, *gone]}})

    def night(run_id: str) -> tuple[list[str], int, list[str]]:
        said: list[str] = []
        config = run_config(icd10.ADDRESS, eval_share=0.4, near_duplicates=0)
        step = StepRun("prepare", run_id, config, store)
        monkeypatch.setattr(step, "say", said.append)
        assert prepare_if_new(step)
        between_runs.advance_watermark(store, "test", run_id)
        sources = between_runs.read_watermark(store, "test")
        return [*sources.sources], step.result["new_records"], said

    first, new, said = night("first")
    assert (first, new) == ([OLD], 42)
    assert "to which the next run adds April 2026's" in said[0]
    again, _, _ = night("first")
    assert again == [OLD]  # the same run once more
    second, new, said = night("second")
    assert second == [OLD, NEWEST]
    assert new == len(terms()) - 2
    assert "has arrived: 12,531 new terms, 40 gone" in said[0]
    third, new, said = night("third")
    assert (third, new, len(said)) == (second, 0, 1)


def test_without_older_releases_the_installed_one_is_read_and_that_is_said(wheels: Path) -> None:
    assert [each.address for each in icd10.arrived(())] == [NEWEST]
    assert "the installed release alone: make setup fetches older ones" in icd10.news([NEWEST])
    with pytest.raises(DataError, match="2021-01 is not on this machine, where example://icd10/2026-04 is: make setup"):
        terms(OLD)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(icd10, "distribution", missing)
    with pytest.raises(DataError, match=r"pip install 'fineloop\[local\]'"):
        next(icd10.rows())
