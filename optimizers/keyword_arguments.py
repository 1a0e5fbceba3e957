"""Keyword arguments that several callables share: written and documented at one of them, shown at each."""

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

__all__ = ["takes_arguments_of"]

_T = TypeVar("_T", bound=Callable[..., Any])

SECTIONS = ("Args", "Returns", "Raises", "Example")


def takes_arguments_of(source: Callable[..., Any], keywords: type[Any]) -> Callable[[_T], _T]:
    """Make a decorator that spells out what ``**keywords`` of a callable stands for.

    Type checkers read the keywords from ``Unpack[...]`` of a ``TypedDict``. Everything that looks at the running
    program (``help``, ``inspect.signature``, completion in a notebook) finds the same arguments in the signature that
    the decorator writes, with the defaults of ``source``, and their documentation in the docstring. A class also shows
    the arguments that its base classes document. Any other keyword is an error.

    Args:
        source: callable that the keywords are passed on to.
        keywords: ``TypedDict`` whose keys are the keywords.

    Example:
        >>> from typing import TypedDict
        >>> class Pace(TypedDict, total=False):
        ...     period: int
        >>> def build(*, base: str = "local", period: int = 12) -> None:
        ...     '''Builds.
        ...
        ...     Args:
        ...         base: base algorithm.
        ...         period: inner steps between outer steps.
        ...     '''
        >>> @takes_arguments_of(build, Pace)
        ... def wrap(model: str, **pace: int) -> None:
        ...     '''Wraps a model.
        ...
        ...     Args:
        ...         model: the model.
        ...         **pace: arguments of ``build``.
        ...     '''
        >>> inspect.signature(wrap)
        <Signature (model: str, *, period: int = 12) -> None>
        >>> print(wrap.__doc__)
        Wraps a model.
        <BLANKLINE>
        Args:
            model: the model.
            period: inner steps between outer steps.
    """
    names: frozenset[str] = keywords.__optional_keys__

    def spell_out(target: _T) -> _T:
        function: Any = vars(target)["__init__"] if isinstance(target, type) else target
        signature = inspect.signature(function)
        explicit = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        passed_on = [one for one in inspect.signature(source).parameters.values() if one.name in names]
        if missing := sorted(names - {one.name for one in passed_on}):
            raise TypeError(f"{source!r} has no arguments {missing}")
        parameters = [*explicit, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in passed_on)]
        known = {one.name for one in parameters}

        @wraps(function)
        def checked(*arguments: Any, **options: Any) -> Any:
            for name in options:
                if name not in known:
                    raise TypeError(f"{target.__name__}() got an unexpected keyword argument {name!r}")
            return function(*arguments, **options)

        shown: Any = checked
        shown.__signature__ = signature.replace(parameters=parameters)
        shown.__annotations__ = {one.name: one.annotation for one in parameters if one.annotation is not one.empty}
        shown.__annotations__["return"] = signature.return_annotation
        documented = [target, source, *(target.__mro__[1:] if isinstance(target, type) else ())]
        docstring = _docstring(documented, [one.name for one in parameters])
        if isinstance(target, type):
            target.__init__ = shown  # type: ignore[misc]
            target.__doc__ = docstring
            return target
        shown.__doc__ = docstring
        decorated: _T = shown
        return decorated

    return spell_out


def _docstring(documented: list[Any], arguments: list[str]) -> str:
    """The first docstring, with the entries of ``Args`` and ``Raises`` that it lacks taken from the others."""
    parsed = [_sections(one.__doc__ or "") for one in documented]
    own, source = parsed[:2]
    texts = [own["text"]]
    if "\n\n" not in own["text"]:  # a summary alone: the description is that of the source
        texts += source["text"].split("\n\n")[1:]
    entries: dict[str, dict[str, str]] = {"Args": {}, "Raises": {}}
    for name, found in entries.items():
        for sections in parsed:
            for entry in re.split(r"\n(?=    \S)", sections.get(name, "").rstrip()):
                found.setdefault(entry.partition(":")[0].strip(), entry)
    described = [entries["Args"][name] for name in arguments if name in entries["Args"]]
    raised = [entry for name, entry in entries["Raises"].items() if name]
    sections = {**own, "Args": "\n".join(described), "Raises": "\n".join(raised)}
    return "\n\n".join([*texts, *(f"{name}:\n{sections[name]}" for name in SECTIONS if sections.get(name))]) + "\n"


def _sections(docstring: str) -> dict[str, str]:
    """The text of a docstring, and the sections that follow it, by their names."""
    text, *rest = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {"text": text.rstrip(), **{name: body.rstrip() for name, body in zip(rest[::2], rest[1::2], strict=True)}}
