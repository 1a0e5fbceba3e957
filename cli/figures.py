"""Figures of matplotlib, which only the commands that draw load."""

from typing import TYPE_CHECKING

from lentando.comm.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure"]


def new_figure(needed_by: str, size_inches: tuple[float, float]) -> "Figure":
    """Return an empty figure. It needs no screen, and nothing has to close it.

    Args:
        needed_by: command or option that draws, for the error message.
        size_inches: width and height in inches.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise ConfigurationError(f"{needed_by} needs matplotlib: pip install matplotlib") from error
    return figure.Figure(figsize=size_inches, layout="constrained")
