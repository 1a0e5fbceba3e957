"""What the commands' options share."""

from collections.abc import Callable
from typing import Any, TypeVar

import typer

from lentando.comm.errors import ConfigurationError

__all__ = ["quantity"]

T = TypeVar("T")


def quantity(parse: Callable[[str], T], metavar: str, explained: str, *names: str) -> Any:
    """An option that is written with units; what cannot be read is an error that says what was expected."""

    def parser(text: Any) -> Any:
        if not isinstance(text, str):  # a default
            return text
        try:
            return parse(text)
        except ConfigurationError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option(*names, parser=parser, metavar=metavar, help=explained)
