"""The plot of ``lentando plan --plot``: time per step against the period."""

from pathlib import Path

from lentando.cli.figures import new_figure
from lentando.cli.planned_job import PlannedJob
from lentando.cli.predictions import Prediction, Recommendation
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.planning import local_sgd_seconds, mean_seconds

__all__ = ["draw"]

PERIODS = [2**power for power in range(11)]


def draw(path: Path, job: PlannedJob, predictions: list[Prediction], recommended: Recommendation) -> None:
    """Write the plot to a file, in the format that its suffix names.

    Args:
        path: file to write.
        job: job whose time per step is drawn.
        predictions: predicted rows; those without a period are drawn as horizontal lines.
        recommended: period to mark.

    Raises:
        ConfigurationError: if matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure("--plot", (7, 4.5))
    axes = figure.subplots()
    compute, size = job.compute, job.size
    times = [1e3 * local_sgd_seconds(compute, size, job.delays, period) for period in PERIODS]
    axes.plot(PERIODS, times, marker="o", color="C0", label="Local SGD")
    flat = [row for row in predictions if row.period is None and row.seconds_per_step is not None]
    for number, row in enumerate(flat, 1):
        axes.axhline(1e3 * (row.seconds_per_step or 0.0), color=f"C{number}", linestyle="--", label=row.algorithm)
    slowest = max(mean_seconds(compute, rank) for rank in range(size))
    axes.axhline(1e3 * slowest, color="black", linewidth=1, label="computation alone")
    if recommended.period is not None:
        axes.axvline(recommended.period, color="grey", linestyle=":", label=f"recommended: {recommended.period}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="period (inner steps between averages)", ylabel="time per step (ms)", ylim=(0, None))
    axes.set_title(f"{size} workers, {compute.distribution} compute times")
    axes.grid(visible=True, alpha=0.25)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot write the picture {path}: {error}") from error
