"""The templates of every page and picture. Values put into them are escaped, and a missing value is an error."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from components.shared.content_policy import script_source

TEMPLATES = Path(__file__).parent / "templates"
SEARCH = (TEMPLATES / "search.js").read_text(encoding="utf-8")
"""The only script of a page: it narrows a table to the rows that contain the searched words."""


def template(name: str) -> Template:
    """Load a template from the folder beside this module."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["tight"] = _tight
    # A page with a search sets this: {% set searches = true %}.
    environment.globals |= {"searches": False, "search_script": SEARCH, "search_source": script_source(SEARCH)}
    return environment.get_template(name)


def _tight(text: str) -> str:
    """Keep a number and its per cent sign on one line."""
    return text.replace(" %", "\u00a0%")
