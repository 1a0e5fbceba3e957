"""Tables: drawn by rich on a terminal, plain text elsewhere."""

import sys
from collections.abc import Sequence

import typer

from lentando.comm.launch import detect_launch

__all__ = ["print_table"]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is aligned to the left, and all others to the right."""
    if sys.stdout.isatty() and detect_launch() is None:  # a pipe behind mpirun looks like a terminal
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD)
        for number, heading in enumerate(header):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        typer.echo("  ".join(cells).rstrip())
