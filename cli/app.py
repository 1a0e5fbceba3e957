"""The command line: all commands, and errors as one line with exit status 2."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import lentando
from lentando.cli.doctor.command import doctor
from lentando.cli.measure import measure
from lentando.cli.plan import plan
from lentando.cli.report.command import report
from lentando.cli.timeline.command import timeline
from lentando.comm.errors import LentandoError

__all__ = ["app", "run"]

# Some versions of Typer include a copy of click, others use the installed one: the error class is that of Typer's copy.
_ClickError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)

app = typer.Typer(
    name="lentando",
    help="Train one model on many workers with less communication: plan it, measure its cost, see what it does.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command()(plan)
app.command()(measure)
app.command()(doctor)
app.command()(timeline)
app.command()(report)


def _version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"lentando {lentando.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train one model on many workers with less communication: plan it, measure its cost, see what it does."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, ``sys.argv`` by default, and return the exit status."""
    try:
        status = app(None if arguments is None else list(arguments), prog_name="lentando", standalone_mode=False)
    except LentandoError as error:
        return _failed(str(error))
    except typer.Abort:
        return 130
    except _ClickError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
            return 2
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "lentando"
        message = error.format_message()  # type: ignore[attr-defined]
        return _failed(message.removeprefix("Invalid value: "), f" (see {command} --help)")
    return status if isinstance(status, int) else 0


def _failed(message: str, hint: str = "") -> int:
    sys.stderr.write(f"lentando: {' '.join(message.split())}{hint}\n")
    return 2
