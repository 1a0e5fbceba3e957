"""Tables as plain text, for terminals, logs and reports."""

from collections.abc import Sequence

__all__ = ["text_table"]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, one line per row, whose first column is aligned to the left and all others to the right.

    Args:
        header: names of the columns.
        rows: cells, as many in each row as there are columns.

    Example:
        >>> print(text_table(["rank", "steps"], [["0", "12"], ["1", "120"]]))
        rank  steps
        ----  -----
        0        12
        1       120
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
