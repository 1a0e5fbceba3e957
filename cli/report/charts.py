"""The charts of a report, as SVG that is legible on light and on dark pages."""

import io
from collections.abc import Sequence
from math import cos, pi, sin
from typing import TYPE_CHECKING

from lentando.cli.figures import new_figure
from lentando.cli.report.logs import Run
from lentando.comm.topology.picture import draw_messages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bars_by_rank", "line_chart", "topology_picture"]

GREY = "#808080"
"""Colour of axes and text, which contrasts with white and with black."""
SIZE_INCHES = (5, 3.2)
PANEL_INCHES = 2.5


def line_chart(runs: Sequence[Run], across: str, up: str, label: str, scale: float = 1.0) -> str | None:
    """Draw one number against another, one line for each run.

    Args:
        runs: runs to compare.
        across: name of the horizontal column.
        up: name of the vertical column.
        label: label of the horizontal axis.
        scale: factor of the horizontal column, such as 1e-6 for megabytes.

    Returns:
        The chart, or None if no run has both numbers.
    """
    lines = [(color, run.name, *run.points(across, up)) for color, run in enumerate(runs)]
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    figure = new_figure("lentando report", SIZE_INCHES)
    axes = figure.subplots()
    drawn = []
    for color, _, x, y in lines:
        plot = axes.step if up == "period" else axes.plot
        marker = "." if len(x) < 30 else None
        drawn += plot([scale * value for value in x], y, marker=marker, color=f"C{color % 10}")
    if up == "period":
        axes.set_ylim(bottom=0)
    axes.set(xlabel=label, ylabel=up.replace("_", " "))
    axes.yaxis.label.set_parse_math(False)
    if len(runs) > 1:
        # Names are set afterwards, as they are: matplotlib leaves out labels that begin with _, and reads $ as TeX.
        legend = axes.legend(drawn, ["run"] * len(drawn), frameon=False, labelcolor=GREY)
        for text, (_, name, _, _) in zip(legend.get_texts(), lines, strict=True):
            text.set_parse_math(False)
            text.set_text(name)
    return _svg(figure, axes)


def bars_by_rank(run: Run) -> str | None:
    """Draw the compute time per step of each rank, as of the last line that contains it.

    Args:
        run: the run.

    Returns:
        The chart, or None if the times are not known.
    """
    prefix = "compute_seconds_by_rank/"
    last = next((line for line in reversed(run.lines) if any(name.startswith(prefix) for name in line)), None)
    if last is None:
        return None
    times = {int(name.removeprefix(prefix)): 1e3 * value for name, value in last.items() if name.startswith(prefix)}
    figure = new_figure("lentando report", SIZE_INCHES)
    axes = figure.subplots()
    axes.bar(list(times), list(times.values()))
    axes.set(xlabel="rank", ylabel="ms computing per step", xticks=list(times) if len(times) <= 16 else [])
    return _svg(figure, axes)


def topology_picture(run: Run) -> str | None:
    """Draw who sends to whom: one circle of ranks for each step of gossip, or one that shows an average of all.

    Args:
        run: the run.

    Returns:
        The picture, or None if a rank trains alone.
    """
    if run.ranks < 2:
        return None
    columns = min(len(run.sends), 2) or 1
    rows = -(-len(run.sends) // columns) or 1
    figure = new_figure("lentando report", (PANEL_INCHES * max(columns, 1.6), PANEL_INCHES * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for step, (panel, sends) in enumerate(zip(panels, run.sends, strict=False)):
        draw_messages(panel, run.ranks, sends, "C0")
        if run.steps_until_repeated > 1:
            panel.set_title(f"step {step + 1} of {run.steps_until_repeated}", fontsize="small", color=GREY)
    if not run.sends:
        draw_messages(panels[0], run.ranks, [], "C0")
        for angle in (2 * pi * rank / run.ranks for rank in range(run.ranks)):
            panels[0].plot([0, sin(angle)], [0, cos(angle)], color="C0", alpha=0.7, zorder=1)
        panels[0].text(0, 0, "mean", ha="center", va="center", bbox={"boxstyle": "round", "color": "C0"}, color="white")
    return _as_svg(figure)


def _svg(figure: "Figure", axes: "Axes") -> str:
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.2, color=GREY)
    return _as_svg(figure)


def _as_svg(figure: "Figure") -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]  # without the declaration of an XML file
