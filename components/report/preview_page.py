"""Renders a preview of what a run would make of its data, as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from typing import Any

from components.report import sections
from components.report.html import template


def build_page(body: Mapping[str, Any], lines: Sequence[str]) -> str:
    """Render the page; `body` is the output of `ray_jobs.preview`, `lines` its meaning in sentences."""
    return template("preview.html").render(
        title=", ".join(each["source"] for each in body["profile"]["sources"]),
        lines=lines,
        problem=body["refused"] or body["gate"]["lacking"],
        data=sections.data_profile(body["profile"]),
        base=body["base"],
        shown=body["shown"],
        unread_because=body["unread_because"],
    )
