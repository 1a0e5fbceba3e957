"""The update rules and everything that users write with them, on flat NumPy arrays. Independent of any framework.

``lentando.torch`` and ``lentando.tensorflow`` export every public name of this package, and those of their framework.
"""

if __name__ == "optimizers":
    raise ImportError(
        "import lentando.optimizers, not optimizers: a second copy of this package would not share its state"
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lentando.optimizers.exports import *
else:

    def __getattr__(name: str) -> Any:
        """A public name, loaded when the first one is used: the command line needs none of them."""
        exports = import_module("lentando.optimizers.exports")
        if name == "__all__" or name in exports.__all__:
            return getattr(exports, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return [*globals(), *__getattr__("__all__")]
