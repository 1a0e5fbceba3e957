"""Output of error_runtime.py: a table, a figure, a page that contains both, and the numbers as JSON."""

import argparse
import base64
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from math import isfinite, nan
from typing import Any

import numpy as np

LEVELS = (1.5, 1.1, 1.01)
"""Multiples of synchronous SGD's final loss at which speed-ups are computed."""
HEADINGS = (
    "method",
    "final loss",
    "above synchronous",
    "time / Y to 1.01x",
    *(f"speed-up to {x:g}x" for x in LEVELS),
    "periods",
)


@dataclass
class Result:
    """Training runs in one setting.

    Attributes:
        title: description of the setting.
        step_seconds: mean of Y.
        average_seconds: mean of D.
        courses: recorded course of each seed, by method; synchronous SGD is the first.
    """

    title: str
    step_seconds: float
    average_seconds: float
    courses: list[dict[str, Any]]


def smoothed(course: Any, budget_seconds: float) -> tuple[Any, Any]:
    """Smooth the curve: each point becomes the mean over a fiftieth of the budget around it."""
    seconds, losses = np.array(course.curve).T
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    first = np.searchsorted(seconds, seconds - budget_seconds / 100, "left")
    last = np.searchsorted(seconds, seconds + budget_seconds / 100, "right")
    means = (sums[last] - sums[first]) / (last - first)
    means[0] = losses[0]
    return seconds, means


def seconds_to(course: Any, loss: float, budget_seconds: float) -> float:
    """Return the time at which the curve first reaches a loss; NaN if it never does."""
    seconds, losses = smoothed(course, budget_seconds)
    reached = np.flatnonzero(losses <= loss)
    return float(seconds[reached[0]]) if len(reached) else nan


def final_loss(course: Any, budget_seconds: float) -> float:
    """Return the mean over the last tenth of the budget."""
    return statistics.fmean(loss for seconds, loss in course.curve if seconds >= 0.9 * budget_seconds)


def figures(result: Result) -> dict[str, dict[str, Any]]:
    """Return lists with one number per seed, by method."""
    found: dict[str, dict[str, Any]] = {}
    for courses in result.courses:
        reference = next(iter(courses.values()))
        budget = reference.seconds
        floor = final_loss(reference, budget)
        for method, course in courses.items():
            numbers = found.setdefault(method, {})

            def add(name: str, value: Any, numbers: dict[str, Any] = numbers) -> None:
                numbers.setdefault(name, []).append(value)

            loss = final_loss(course, budget)
            add("final_loss", loss)
            add("above_synchronous", loss / floor - 1)
            add("seconds_per_step", course.seconds / course.steps)
            add("periods", [period for _, period in course.periods])
            for level in LEVELS:
                seconds = seconds_to(course, level * floor, budget)
                add(f"seconds_to_{level:g}", seconds)
                add(f"speedup_to_{level:g}", seconds_to(reference, level * floor, budget) / seconds)
    return found


def spread(values: Sequence[float], form: str) -> str:
    """Format mean and standard deviation over the seeds that reached the loss."""
    there = [value for value in values if isfinite(value)]
    if not there:
        return "never"
    text = form.format(statistics.fmean(there))
    if len(there) > 1:
        text += " ± " + form.format(statistics.stdev(there)).lstrip("+")
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)})"


def rows(result: Result) -> list[list[str]]:
    found = []
    for method, numbers in figures(result).items():
        times = [seconds / result.step_seconds for seconds in numbers["seconds_to_1.01"]]
        periods = numbers["periods"][0]
        found.append(
            [
                method,
                spread(numbers["final_loss"], "{:.4f}"),
                spread([100 * value for value in numbers["above_synchronous"]], "{:+.1f}") + " %",
                spread(times, "{:.0f}"),
                *(spread(numbers[f"speedup_to_{level:g}"], "{:.2f}") for level in LEVELS),
                ", ".join(map(str, periods[:8])) + (", ..." if len(periods) > 8 else ""),
            ]
        )
    return found


def comparison(measured: Result, predicted: Result) -> list[list[str]]:
    """Compare the measured values with a simulation that has the same Y and D."""
    found = []
    synchronous = [statistics.fmean(next(iter(figures(r).values()))["seconds_per_step"]) for r in (measured, predicted)]
    for (method, real), virtual in zip(figures(measured).items(), figures(predicted).values(), strict=True):
        row = [method]
        seconds = [statistics.fmean(numbers["seconds_per_step"]) for numbers in (real, virtual)]
        for pair in (
            [1e3 * value for value in seconds],
            [alone / value for alone, value in zip(synchronous, seconds, strict=True)],
            [statistics.fmean(numbers["speedup_to_1.01"]) for numbers in (real, virtual)],
        ):
            row += [f"{value:.3g}" if isfinite(value) else "never" for value in pair]
            row.append(f"{100 * (pair[1] / pair[0] - 1):+.0f} %" if all(map(isfinite, pair)) else "-")
        found.append(row)
    return found


COMPARED = (
    "method",
    *(
        f"{what}, {who}"
        for what in ("ms / step", "speed-up of a step", "speed-up to 1.01x")
        for who in ("measured", "simulated", "difference")
    ),
)


def tables(results: Sequence[Result]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    found: list[tuple[str, Sequence[str], list[list[str]]]] = [(r.title, HEADINGS, rows(r)) for r in results]
    if results[0].title.startswith("measured"):
        found.append(("measured and simulated", COMPARED, comparison(*results)))
    return found


def draw(results: Sequence[Result]) -> bytes:
    """Draw the figure of the paper as PNG: training loss and period against time, one column per setting."""
    import matplotlib as mpl

    mpl.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(results), figsize=(5.2 * len(results), 6.4), layout="constrained", squeeze=False, sharex="col",
        height_ratios=(3, 1),
    )  # fmt: skip
    methods = dict.fromkeys(method for result in results for method in result.courses[0])
    colors = {method: f"C{number}" for number, method in enumerate(methods)}
    for (upper, lower), result in zip(axes.T, results, strict=True):
        budget = statistics.fmean(next(iter(courses.values())).seconds for courses in result.courses)
        grid = np.linspace(0, budget, 300)
        floor = statistics.fmean(figures(result)[next(iter(result.courses[0]))]["final_loss"])
        lowest = floor
        for method in result.courses[0]:
            curves: list[Any] = []
            for courses in result.courses:
                seconds, losses = smoothed(courses[method], courses[next(iter(courses))].seconds)
                curves.append(np.interp(grid, seconds, losses))
            color = colors[method]
            lowest = min(lowest, np.min(np.mean(curves, axis=0)))
            upper.plot(grid / result.step_seconds, np.mean(curves, axis=0), color=color, label=method, linewidth=1.6)
            upper.fill_between(
                grid / result.step_seconds, np.min(curves, axis=0), np.max(curves, axis=0), color=color, alpha=0.15
            )
            changes = [*result.courses[0][method].periods, (budget, result.courses[0][method].periods[-1][1])]
            seconds, periods = zip(*changes, strict=True)
            lower.step(np.array(seconds) / result.step_seconds, periods, where="post", color=color, linewidth=1.4)
        upper.axhline(1.01 * floor, color="black", linewidth=0.8, linestyle=":")
        upper.set(title=result.title.replace(": ", ":\n"), ylabel="training loss", yscale="log")
        upper.set_ylim(0.98 * lowest, 2.2 * floor)
        upper.yaxis.set_minor_formatter("{x:.2g}")
        upper.yaxis.set_major_formatter("{x:.2g}")
        upper.grid(visible=True, which="both", alpha=0.2)
        lower.set(xlabel="time / Y", ylabel="period", yscale="log")
        lower.set_yscale("log", base=2)
        lower.grid(visible=True, alpha=0.2)
    axes[0, 0].legend(fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()


def page(results: Sequence[Result], picture: bytes, flags: dict[str, Any]) -> str:
    """Return one self-contained page with all results."""
    parts = []
    for title, headings, lines in tables(results):
        head = "".join(f"<th>{escape(text)}</th>" for text in headings)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        parts.append(f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>")
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in flags.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Error against run time</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }} h2 {{ font-size: 1.1em; margin-top: 1.8em }}
</style></head><body><h1>Training loss against time</h1>
<p>Means over {len(results[0].courses)} seed(s) ± standard deviation. Speed-ups: the time of synchronous SGD to a
multiple of its own final loss, over the method's. The dotted line is 1 % above that loss; bands go from the lowest to
the highest seed; periods are those of the first seed.</p>
<img alt="training loss and period against time" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
{"".join(parts)}<p>{escape(settings)}</p></body></html>
"""


def write(results: Sequence[Result], options: argparse.Namespace) -> None:
    """Print the tables, and write the files if a folder was given."""
    flags = {name: value for name, value in vars(options).items() if name not in ("report", "json", "jobs")}
    numbers = {
        "flags": flags,
        "results": [
            {
                "title": result.title,
                "step_seconds": result.step_seconds,
                "average_seconds": result.average_seconds,
                "methods": figures(result),
            }
            for result in results
        ],
    }
    if options.json:
        print(json.dumps(_without_nan(numbers)))
    else:
        _print(results)
    if options.report is not None:
        options.report.mkdir(parents=True, exist_ok=True)
        picture = draw(results)
        (options.report / "error_runtime.png").write_bytes(picture)
        (options.report / "error_runtime.html").write_text(page(results, picture, flags))
        curves = [[{name: asdict(course) for name, course in c.items()} for c in r.courses] for r in results]
        (options.report / "error_runtime.json").write_text(json.dumps(_without_nan({**numbers, "courses": curves})))
        if not options.json:
            print(f"written to {options.report}: error_runtime.html, error_runtime.png, error_runtime.json")


def _print(results: Sequence[Result]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    for title, headings, lines in tables(results):
        # A pipe behind mpirun looks like a terminal.
        table = Table(title=title, box=box.SIMPLE_HEAD, title_style="", header_style="", title_justify="left")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None: a loss that was never reached."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
