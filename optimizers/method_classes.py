"""The methods of the papers as classes, which every framework declares in a few lines."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from lentando.optimizers.keyword_arguments import takes_arguments_of
from lentando.optimizers.methods import (
    AdaCommArguments,
    DiLoCoArguments,
    SlowMoArguments,
    adacomm,
    diloco,
    slowmo,
)
from lentando.optimizers.rules.settings import Settings

__all__ = ["ADACOMM", "DILOCO", "SLOWMO", "Method"]

_T = TypeVar("_T", bound=type[Any])

EXAMPLE = "base=lt.SGP()"
"""Settings in the example of every framework's ``DistributedOptimizer``, in place of which a method shows its own."""


@dataclass(frozen=True)
class Method:
    """A method of a paper, as a decorator for a subclass of a framework's ``DistributedOptimizer``.

    The class declares the typed arguments of its constructor, for type checkers, and leaves the body empty (``...``).
    The decorator fills it in, spells out the arguments of the method for ``help`` and ``inspect.signature``, documents
    them, and adds the example of ``DistributedOptimizer`` with the settings of this method.

    Args:
        build: function that returns the settings of the method.
        keywords: ``TypedDict`` of its arguments.
        example: settings that the example shows.
    """

    build: Callable[..., Settings]
    keywords: type[Any]
    example: str

    def __call__(self, target: _T) -> _T:
        """Fill in the constructor and the documentation of a class.

        Args:
            target: subclass of a ``DistributedOptimizer``, whose constructor takes the same arguments as that of its
                base class, with ``**settings`` of this method.

        Raises:
            TypeError: if the example of the base class does not contain ``EXAMPLE``.
        """
        names: frozenset[str] = self.keywords.__optional_keys__
        method: Method = self
        base: Any = target.__mro__[1]

        @wraps(vars(target)["__init__"])
        def construct(self: Any, /, *arguments: Any, **options: Any) -> None:
            settings = method.build(**{name: options.pop(name) for name in names & options.keys()})
            base.__init__(self, *arguments, **options, **vars(settings))

        target.__init__ = construct
        takes_arguments_of(self.build, self.keywords)(target)
        text, _, example = inspect.cleandoc(base.__doc__ or "").partition("\n\nExample:\n")
        if EXAMPLE not in example:
            raise TypeError(f"expected an example with {EXAMPLE} in the docstring of {base.__name__}, found {text!r}")
        example = example.replace(f"{base.__name__}(", f"{target.__name__}(").replace(EXAMPLE, self.example)
        target.__doc__ = f"{target.__doc__}\nExample:\n{example}\n"
        return target


SLOWMO = Method(slowmo, SlowMoArguments, "period=12, slow_momentum=0.5")
"""Decorator for a framework's class ``SlowMo``."""

DILOCO = Method(diloco, DiLoCoArguments, "period=500, outer_lr=0.7")
"""Decorator for a framework's class ``DiLoCo``."""

ADACOMM = Method(adacomm, AdaCommArguments, "initial_period=8, interval_seconds=30.0")
"""Decorator for a framework's class ``AdaComm``."""
