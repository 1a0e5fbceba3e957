"""Pictures of a sequence of graphs. Only ``draw`` loads matplotlib."""

from collections.abc import Iterable, Sequence
from math import ceil, cos, pi, sin
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lentando.comm.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_messages"]

MOST_PANELS = 12
PANEL_INCHES = 3.0


class _Graphs(Protocol):
    """The part of a ``GraphSequence`` that a picture shows."""

    size: int
    period_steps: int
    lead_steps: int

    def messages(self, step: int) -> Sequence[tuple[int, int]]: ...


def draw(graphs: _Graphs, path: str | Path | None = None) -> "Figure":
    """Draw the ranks on a circle with an arrow for each message, one panel per step of the period, up to 12.

    Args:
        graphs: sequence of graphs; legible up to about 64 ranks.
        path: file in which the figure is saved (.png, .pdf, .svg); not saved if None.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("a picture needs matplotlib: pip install matplotlib") from error
    steps = range(graphs.lead_steps, graphs.lead_steps + min(graphs.period_steps, MOST_PANELS))
    columns = min(len(steps), 4)
    rows = ceil(len(steps) / columns)
    figure = Figure(figsize=(PANEL_INCHES * max(columns, 1.5), PANEL_INCHES * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels:
        panel.set_axis_off()
    for panel, step in zip(figure.axes, steps, strict=False):
        draw_messages(panel, graphs.size, graphs.messages(step), f"C{step % 10}")
        panel.set_title(f"step {step}", fontsize="small")
    figure.suptitle(str(graphs).replace(": ", "\n"), fontsize="small")
    if path is not None:
        figure.savefig(path)
    return figure


def draw_messages(panel: "Axes", size: int, sends: Iterable[Sequence[int]], color: str) -> None:
    """Draw the ranks on a circle, clockwise from the top, and an arrow for each message.

    Args:
        panel: where to draw; its axes are switched off.
        size: number of ranks; they are numbered up to 64.
        sends: sender and receiver of each message.
        color: colour of the arrows.
    """
    panel.set_axis_off()
    angles = [pi / 2 - 2 * pi * rank / size for rank in range(size)]
    positions = [(cos(angle), sin(angle)) for angle in angles]
    for sender, receiver in sends:
        panel.annotate(
            "",
            xy=positions[receiver],
            xytext=positions[sender],
            arrowprops={
                "arrowstyle": "-|>",
                "color": color,
                "alpha": 0.7,
                "shrinkA": 7,
                "shrinkB": 7,
                "connectionstyle": "arc3,rad=0.12",  # separates the two directions of an edge
            },
        )
    across, up = zip(*positions, strict=True)
    panel.scatter(across, up, s=160, color="white", edgecolors="black", zorder=3)
    if size <= 64:
        for rank, (x, y) in enumerate(positions):
            panel.text(x, y, str(rank), ha="center", va="center", fontsize=7, zorder=4)
    panel.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
