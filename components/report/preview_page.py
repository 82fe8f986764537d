"""What a run would make of its data, as one HTML page that needs nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from components.report import sections
from components.report.html import template


def build_page(body: Mapping[str, Any], lines: Sequence[str]) -> str:
    """The page; `body` is what `ray_jobs.preview` prints, `lines` what it means in sentences."""
    return template("preview.html").render(
        title=", ".join(each["source"] for each in body["profile"]["sources"]),
        lines=lines,
        problem=body["gate"]["lacking"],
        data=sections.data_profile(body["profile"]),
        base=body["base"],
        shown=body["shown"],
        unread_because=body["unread_because"],
    )
