"""Nested containers that can be sent between ranks and saved in checkpoints. They keep their type.

Lists, tuples, sets, frozensets, dicts, ``OrderedDict``, ``Counter``, and ``defaultdict`` of a built-in type. A subclass
of one of them would be decoded as its base class, and is therefore not accepted as a container.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from lentando.comm.errors import ConfigurationError

__all__ = ["DEEPEST", "Leaf", "children", "mapped", "plain", "rebuilt"]

DEEPEST = 100
"""Limit of nesting levels: more would exhaust Python's stack, in JSON's encoder for instance."""

SEQUENCES: tuple[type, ...] = (list, tuple, set, frozenset)
DICTIONARIES: tuple[type, ...] = (dict, OrderedDict, Counter, defaultdict)

SHOWN_CHARACTERS = 200
"""Limit of the length of a location in an error message."""

Leaf: TypeAlias = Callable[[Any, str], Any]
"""Converts a value that is no container. Its second argument is the location of the value, for messages."""


def children(value: Any) -> list[tuple[str, Any]] | None:
    """The items of a container, each with its location as in ``[0]`` or ``['key']``; None for any other value."""
    kind = type(value)
    if kind in (set, frozenset):
        return [("{...}", item) for item in value]
    if kind in SEQUENCES:
        return [(f"[{number}]", item) for number, item in enumerate(value)]
    if kind in DICTIONARIES:
        return [(f"[{key!r}]", item) for key, item in value.items()]
    return None


def rebuilt(value: Any, items: Iterable[Any]) -> Any:
    """A container of the type of ``value`` that holds other items; in a dictionary, the values are replaced."""
    kind = type(value)
    if kind in SEQUENCES:
        return kind(items)
    pairs = zip(value, items, strict=True)
    if kind is defaultdict:
        return defaultdict(value.default_factory, pairs)
    return kind(dict(pairs)) if kind is Counter else kind(pairs)


def mapped(value: Any, leaf: Leaf, where: str = "the object") -> Any:
    """A copy of nested containers, with ``leaf(value, where)`` in place of each value that is no container.

    Args:
        value: the nested containers; not changed.
        leaf: converts a value that is no container.
        where: location of ``value`` itself, for messages.

    Raises:
        ConfigurationError: if a container contains itself, or the nesting is too deep; the message names the location.
    """
    inside: set[int] = set()

    def convert(value: Any, where: str) -> Any:
        contents = children(value)
        if contents is None:
            return leaf(value, where)
        if id(value) in inside:
            raise ConfigurationError(f"{shortened(where)} contains itself: break the cycle")
        if len(inside) == DEEPEST:
            raise ConfigurationError(f"{shortened(where)} is inside {DEEPEST} other containers: nest fewer")
        inside.add(id(value))
        items = [convert(item, where + location) for location, item in contents]
        inside.remove(id(value))
        return rebuilt(value, items)

    return convert(value, where)


def plain(value: Any, convert: Callable[[Any], Any], where: str = "the object") -> Any:
    """A copy of nested containers with arrays in place of a framework's tensors, to be sent or saved.

    Args:
        value: the nested containers; not changed.
        convert: returns the array of a tensor, and any other value unchanged.
        where: location of ``value`` itself, for messages.

    Raises:
        ConfigurationError: for a tensor that ``convert`` cannot convert, and for a container that contains itself. The
            message names the location.
    """

    def leaf(value: Any, where: str) -> Any:
        try:
            return convert(value)
        except (ConfigurationError, RuntimeError) as error:
            raise ConfigurationError(f"{shortened(where)}: {error}") from error

    return mapped(value, leaf, where)


def shortened(where: str) -> str:
    """A location, cut to a readable length."""
    return where if len(where) <= SHOWN_CHARACTERS else f"{where[:SHOWN_CHARACTERS]}..."
