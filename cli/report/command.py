"""``lentando report``: draws the logs of runs as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from lentando.cli.report.logs import read_runs
from lentando.cli.report.page import render
from lentando.comm.errors import ConfigurationError

__all__ = ["report"]


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, to be compared.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Page to write. [default: report.html in the first RUN]")
    ] = None,
) -> None:
    """Draw the logs of one or several runs as one HTML page, which needs no network.

    A program writes the log of its run:

    log = optimizer.open_log("runs/slowmo"), and then log.write(loss=loss) on every rank, after each epoch

    lentando report runs/slowmo runs/synchronous

    The page shows each number against steps, seconds and bytes, the period, the distance between the replicas, and the
    compute time of each rank.
    """
    page = render(read_runs(folders))
    path = output or folders[0] / "report.html"
    try:
        path.write_text(page)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error
    typer.echo(path)
