"""Nested containers of the kinds that travel between ranks and are saved: they keep their kind, and no other is taken.

Lists, tuples, sets, frozensets, dicts, ``OrderedDict``, ``Counter``, and ``defaultdict`` of a built-in type. A subclass
of one of them would come back as something else, so it is no container here.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from lentando.comm.errors import ConfigurationError

__all__ = ["DEEPEST", "Leaf", "children", "mapped", "rebuilt"]

DEEPEST = 100
"""Levels of containers within each other: more would exhaust Python's stack, in JSON's encoder for instance."""

SEQUENCES: tuple[type, ...] = (list, tuple, set, frozenset)
DICTIONARIES: tuple[type, ...] = (dict, OrderedDict, Counter, defaultdict)

SHOWN_CHARACTERS = 200
"""Of a place in an error message."""

Leaf: TypeAlias = Callable[[Any, str], Any]
"""Makes something of a value that is no container; is also given its place, for messages."""


def children(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, each with its place in it as in ``[0]`` or ``['key']``; None for any other value."""
    kind = type(value)
    if kind in (set, frozenset):
        return [("{...}", item) for item in value]
    if kind in SEQUENCES:
        return [(f"[{number}]", item) for number, item in enumerate(value)]
    if kind in DICTIONARIES:
        return [(f"[{key!r}]", item) for key, item in value.items()]
    return None


def rebuilt(value: Any, items: Iterable[Any]) -> Any:
    """A container of the kind of ``value``, with these items in place of its own (of a dictionary: for its keys)."""
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
        value: not changed.
        leaf: see ``Leaf``.
        where: place of ``value`` itself.

    Raises:
        ConfigurationError: if a container holds itself, or too many are inside each other; says where.
    """
    inside: set[int] = set()

    def convert(value: Any, where: str) -> Any:
        found = children(value)
        if found is None:
            return leaf(value, where)
        if id(value) in inside:
            raise ConfigurationError(f"{shortened(where)} is one of the containers that hold it: it has no end")
        if len(inside) == DEEPEST:
            raise ConfigurationError(f"{shortened(where)} is inside {DEEPEST} other containers: nest fewer")
        inside.add(id(value))
        items = [convert(item, where + place) for place, item in found]
        inside.remove(id(value))
        return rebuilt(value, items)

    return convert(value, where)


def shortened(where: str) -> str:
    """A place of readable length."""
    return where if len(where) <= SHOWN_CHARACTERS else f"{where[:SHOWN_CHARACTERS]}..."
