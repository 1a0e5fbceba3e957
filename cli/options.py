"""What the options of several commands share: quantities with units, and options grouped in dataclasses."""

import dataclasses
import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar, get_type_hints

import typer

from lentando.comm.errors import ConfigurationError

__all__ = ["CodedDtype", "Dtype", "grouped", "quantity"]

T = TypeVar("T")


class Dtype(str, Enum):
    """Data type of the parameters of a model."""

    float32 = "float32"
    float64 = "float64"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def size_bytes(self) -> int:
        """Size of one parameter in bytes."""
        return {"float64": 8, "float32": 4}.get(self.value, 2)


class CodedDtype(str, Enum):
    """How the messages of outer steps hold the parameters."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


def quantity(parse: Callable[[str], T], metavar: str, explained: str, *names: str) -> Any:
    """Return an option whose value is written with a unit.

    Args:
        parse: function that converts the text; its ``ConfigurationError`` becomes the error of the option.
        metavar: placeholder for the value in the help.
        explained: sentence for the help.
        names: names of the option, such as ``--latency``.
    """

    def parser(text: Any) -> Any:
        if not isinstance(text, str):  # a default
            return text
        try:
            return parse(text)
        except ConfigurationError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option(*names, parser=parser, metavar=metavar, help=explained)


def grouped(command: Callable[..., T]) -> Callable[..., T]:
    """Return a command whose options are the fields of the dataclasses that ``command`` takes.

    Each parameter of ``command`` is annotated with a dataclass. Each field of it becomes an option with the field's
    annotation and default. Typer reads them from the signature of the command that is returned.
    """
    groups: dict[str, Any] = get_type_hints(command)
    groups.pop("return", None)
    parameters = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hint)
        for group in groups.values()
        for field, hint in zip(
            dataclasses.fields(group), get_type_hints(group, include_extras=True).values(), strict=True
        )
    ]

    def with_options(**values: Any) -> T:
        arguments = {
            name: group(**{field.name: values[field.name] for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        return command(**arguments)

    with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_options
