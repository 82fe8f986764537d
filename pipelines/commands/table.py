"""Format rows as a text table."""

from collections.abc import Sequence

from components.shared.protocol import printable


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align the rows in columns, each as wide as its widest cell; the last column is not padded."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=True)), row[-1]])
        for row in rows
    )
