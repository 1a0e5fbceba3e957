"""The page of a report: one HTML file that refers to nothing outside of it."""

from collections.abc import Sequence
from html import escape

from lentando.cli.quantities import format_bytes, format_seconds
from lentando.cli.report.charts import bars_by_rank, line_chart, topology_picture
from lentando.cli.report.logs import Run
from lentando.optimizers.run_log import TAKEN

__all__ = ["render"]

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.charts { margin-top: 1.5rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; }
figcaption { font-weight: 600; }
.table { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #8080804d; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
code { overflow-wrap: anywhere; }
"""
OF_OPTIMIZER = TAKEN - {"consensus_distance"}
"""Numbers that are in every log; the others are the user's own."""


def render(runs: Sequence[Run]) -> str:
    """Return the page.

    Args:
        runs: runs to compare, at least one.
    """
    title = "Training run" if len(runs) == 1 else "Training runs"
    charts = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in _charts(runs) if svg
    )
    methods = "".join(
        f"<p><b>{escape(run.name)}</b>, {run.ranks} ranks: <code>{escape(run.method)}</code></p>" for run in runs
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>{methods}"
        f'<div class="table">{_table(runs)}</div><div class="charts">{charts}</div></body></html>\n'
    )


def _own_numbers(runs: Sequence[Run]) -> list[str]:
    names = [name for run in runs for line in run.lines for name in line]
    return [name for name in dict.fromkeys(names) if name.partition("/")[0] not in OF_OPTIMIZER]


def _charts(runs: Sequence[Run]) -> list[tuple[str, str | None]]:
    own = [name for name in _own_numbers(runs) if name != "consensus_distance"]
    found: list[tuple[str, str | None]] = []
    for name in own:
        about = name.replace("_", " ")
        found.append((f"{about} against steps", line_chart(runs, "step", name, "inner steps")))
        found.append((f"{about} against time", line_chart(runs, "seconds", name, "seconds")))
        sent = line_chart(runs, "bytes_sent", name, "MB sent by all ranks", 1e-6)
        found.append((f"{about} against communication", sent))
    found.append(("period", line_chart(runs, "step", "period", "inner steps")))
    consensus = line_chart(runs, "step", "consensus_distance", "inner steps")
    found.append(("distance between the replicas", consensus))
    found += [(f"compute time by rank, {run.name}", bars_by_rank(run)) for run in runs]
    found += [(f"who {_exchange(run)}, {run.name}", topology_picture(run)) for run in runs]
    return found


def _exchange(run: Run) -> str:
    return "sends to whom" if run.sends else "averages with whom"


def _table(runs: Sequence[Run]) -> str:
    own = _own_numbers(runs)
    header = ["run", "steps", "rounds", "time", "bytes sent by all ranks", "waiting", *(f"last {name}" for name in own)]
    rows = []
    for run in runs:
        last = run.lines[-1]
        rows.append(
            [
                run.name,
                f"{last['step']:.0f}",
                f"{last['rounds']:.0f}",
                format_seconds(last["seconds"]),
                format_bytes(last["bytes_sent"]),
                format_seconds(last["waiting_seconds"]),
                *(_last(run, name) for name in own),
            ]
        )
    head = "".join(f"<th>{escape(cell.replace('_', ' '))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _last(run: Run, name: str) -> str:
    _, values = run.points("step", name)
    return f"{values[-1]:.4g}" if values else ""
