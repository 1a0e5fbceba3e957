"""Tables: drawn by rich on a terminal, plain text elsewhere."""

import sys
from collections.abc import Sequence

import typer

from lentando.comm.launch import detect_launch
from lentando.comm.text_tables import text_table

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
    typer.echo(text_table(header, rows))
