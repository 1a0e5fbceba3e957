"""The base optimizer as text, by which ranks check that all of them have wrapped the same one.

The text contains no address in memory and no object of a framework, so that equal settings have equal texts on every
rank.
"""

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import partial
from inspect import Parameter, signature
from math import isfinite
from numbers import Integral, Real
from typing import Any
from zlib import crc32

import numpy as np

from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.comm.transport import as_bytes

__all__ = [
    "OptimizerDescription",
    "by_group",
    "check_same_optimizer",
    "constructor_arguments",
    "in_plain_words",
    "plain_attributes",
    "qualified_name",
    "warn_of_other_state",
]

_log = logging.getLogger("lentando")

MOST_ELEMENTS = 64
"""Elements of the largest array that is written out."""
MOST_LEVELS = 8
"""Levels of nested values that are described."""
NOT_COMPARED = {"built", "device", "local_rank", "name", "rank", "seed", "verbose", "world_size"}
"""Attributes that may well differ between ranks."""
MOST_NAMED = 4
"""Largest number of hyperparameters that an error names."""


@dataclass(frozen=True)
class OptimizerDescription:
    """Description of a base optimizer, which ranks compare.

    Attributes:
        kind: qualified name of its class.
        hyperparameters: hyperparameters as text, by name, without those that only choose an implementation.
        learning_rates: learning rate, its schedule and what is derived from it, as text, by name.
        state: number of steps that the optimizer has taken, and of parameters for which it has state, as text.
        attributes: arguments of its constructor that it keeps as plain attributes, as text, by name; the result of
            ``plain_attributes``.
    """

    kind: str
    hyperparameters: Mapping[str, str]
    learning_rates: Mapping[str, str]
    state: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def keeps_second_moments(self) -> bool:
        """Whether steps are divided by a running mean of squared gradients, as Adam's and RMSprop's are.

        Recognized by a hyperparameter whose name begins with "eps": the term that keeps this division finite.
        """
        return any(name.startswith("eps") for name in self.hyperparameters)

    @property
    def keeps_average_of_weights(self) -> bool:
        """Whether it keeps a moving average of the weights, as Keras's optimizers do with ``use_ema=True``."""
        return self.hyperparameters.get("use_ema") == "True"

    def as_plain(self, with_rates: bool) -> dict[str, Any]:
        """The description as plain data without the state, which may still be made equal by a broadcast.

        Args:
            with_rates: whether learning rates are included.
        """
        plain = asdict(self)
        del plain["state"]
        if not with_rates:
            plain["learning_rates"] = {}
        return plain


def check_same_optimizer(frameworks: Sequence[str], described: Sequence[Mapping[str, Any]]) -> None:
    """Compare the base optimizers of all ranks, each with those of its own framework.

    Optimizers of one name differ between frameworks, in their hyperparameters too.

    Args:
        frameworks: names of the frameworks, by rank.
        described: what ``OptimizerDescription.as_plain`` returned, by rank.

    Raises:
        MismatchError: with the class, or the hyperparameters, in which ranks differ.
    """
    for framework in dict.fromkeys(frameworks):
        ranks = [rank for rank, name in enumerate(frameworks) if name == framework]
        found = _differences([described[rank] for rank in ranks], ranks)
        if found:
            more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
            raise MismatchError(
                f"the base optimizers differ between ranks. {'; '.join(found[:MOST_NAMED])}{more}. Give every rank an "
                "optimizer of the same class with the same hyperparameters. If some ranks have loaded an optimizer's "
                "state, load it on all of them. Learning rates that differ on purpose need rates_may_differ=True"
            )


def warn_of_other_state(frameworks: Sequence[str], states: Sequence[str]) -> None:
    """Log one warning if base optimizers of one framework have different state when they are wrapped.

    It is no error, because the state may be broadcast after the optimizer is wrapped.

    Args:
        frameworks: names of the frameworks, by rank.
        states: what ``OptimizerDescription.state`` contains, by rank.
    """
    found = []
    for framework in dict.fromkeys(frameworks):
        ranks = [rank for rank, name in enumerate(frameworks) if name == framework]
        words = [states[rank] for rank in ranks]
        if len(set(words)) > 1:
            found.append(grouped_by_rank(words, ranks))
    if found:
        _log.warning(
            "the base optimizers that are wrapped have different state. %s. Unless it is made equal, the replicas take "
            "different steps, and those that should stay equal diverge without another warning. Load the "
            "optimizer's state on all ranks, or broadcast that of one rank before the first step: "
            "broadcast_optimizer_state(optimizer, rank) in PyTorch, broadcast_variables(optimizer.variables, rank) "
            "of the base optimizer in Keras",
            "; ".join(found),
        )


def _differences(described: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> list[str]:
    kinds = [str(one["kind"]) for one in described]
    if len(set(kinds)) > 1:
        return [f"Class: {grouped_by_rank(kinds, ranks)}"]
    settings = [{**one["attributes"], **one["hyperparameters"], **one["learning_rates"]} for one in described]
    found = []
    for name in sorted({name for one in settings for name in one}):
        values = [one.get(name, "not there") for one in settings]
        if len(set(values)) > 1:
            found.append(f"{name}: {grouped_by_rank(values, ranks)}")
    return found


def constructor_arguments(kind: type) -> Iterator[str]:
    """Names of the arguments of the constructors of a class and its base classes."""
    for ancestor in kind.__mro__:
        if "__init__" in vars(ancestor) and ancestor is not object:
            for name, parameter in signature(vars(ancestor)["__init__"]).parameters.items():
                if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                    yield name


def plain_attributes(optimizer: Any, known: Container[str]) -> tuple[dict[str, str], str]:
    """Numbers, strings and booleans that an optimizer keeps as attributes, as optimizers that users write do.

    An attribute is a hyperparameter if an argument of the constructor has its name, without leading underscores. Other
    public ones may be counters, which differ where some ranks have loaded a state.

    Args:
        optimizer: optimizer of any framework.
        known: names that are described already.

    Returns:
        The hyperparameters as text, by name, and one text of all others.
    """
    arguments = set(constructor_arguments(type(optimizer)))
    settings, others = {}, []
    for attribute, value in sorted(vars(optimizer).items()):
        name = attribute.lstrip("_")
        is_plain = value is None or isinstance(value, bool | np.bool_ | str | Real)
        if not is_plain or name in known or name in NOT_COMPARED:
            continue
        if name in arguments:
            settings[name] = in_plain_words(value)
        elif name == attribute:
            others.append(f"{name}={in_plain_words(value)}")
    return settings, ", ".join(others)


def by_group(values: Sequence[str]) -> str:
    """A hyperparameter of all parameter groups as text: once if it is the same in all of them."""
    return values[0] if len(set(values)) == 1 else f"{', '.join(values)} (by parameter group)"


def qualified_name(kind: Any) -> str:
    """Qualified name of a class or function, such as ``torch.optim.sgd.SGD``."""
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', type(kind).__qualname__)}"


def in_plain_words(value: Any, convert: Callable[[Any], Any] = lambda value: value, levels: int = MOST_LEVELS) -> str:
    """A hyperparameter as text that is equal on all ranks where the value is equal.

    Numbers have the same text whatever their type: 1, 1.0 and a tensor of 1; and 0.1 in float32 as in float64.

    Args:
        value: value of any type. An unknown type is represented by its name.
        convert: function that converts a framework's values (tensors, schedules) to known types.
        levels: number of levels of nested values that are written out.
    """
    value = convert(value)
    if levels == 0:
        return "..."

    def inside(item: Any) -> str:
        return in_plain_words(item, convert, levels - 1)

    if isinstance(value, Enum):
        return str(value)
    if value is None or isinstance(value, bool | str | bytes):
        return repr(value)
    if isinstance(value, np.ndarray):
        return _array_in_words(value)
    if isinstance(value, np.bool_):
        return repr(bool(value))
    if isinstance(value, Real):
        return _number_in_words(value)
    if isinstance(value, complex | np.complexfloating):
        return str(value)
    if isinstance(value, Mapping):
        pairs = [(key if isinstance(key, str) else inside(key), inside(item)) for key, item in value.items()]
        return f"{{{', '.join(f'{key}: {item}' for key, item in sorted(pairs))}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(inside, value))})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(inside, value)))}}}"
    if isinstance(value, partial):
        return f"{inside(value.func)} with {inside(value.args)} and {inside(value.keywords)}"
    if is_dataclass(value) and not isinstance(value, type):
        own = {each.name: getattr(value, each.name) for each in fields(value)}
        return f"{qualified_name(type(value))} {inside(own)}"
    return qualified_name(value if hasattr(value, "__qualname__") else type(value))


def _number_in_words(value: Any) -> str:
    if isinstance(value, Integral) or (isfinite(value) and value == int(value)):
        return str(int(value))
    return str(value) if isinstance(value, np.floating) else repr(float(value))


def _array_in_words(array: Any) -> str:
    if array.size == 1:
        return in_plain_words(array.reshape(-1)[0])
    if array.size <= MOST_ELEMENTS:
        return f"({', '.join(map(in_plain_words, array.reshape(-1)))})"
    checksum = crc32(as_bytes(np.ascontiguousarray(array)).data)
    return f"an array of shape {array.shape}, {array.dtype}, with checksum {checksum:08x}"
