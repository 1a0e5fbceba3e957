"""Loss against bytes and against seconds: outer steps at once, with a delay, in fragments, and in 8 and 4 bits.

    python benchmarks/quantized.py                            # 8 simulated workers, 3 seeds: half an hour of a core
    python benchmarks/quantized.py --seeds 0 --steps 96       # five minutes
    sudo python benchmarks/quantized.py --places links        # 4 hosts at 100 Mbit/s: a quarter of an hour
    sudo python benchmarks/quantized.py --places simulated links --results benchmarks/results

A small transformer learns the reference of the Python language; ``benchmarks/peers/language.py`` describes it, and
trains it once for each method and seed. Each result is kept in a file of the folder ``--runs``: a program that was
interrupted continues where it was, and measures nothing again. Over links, an iteration computes for a
quarter of the time that the link needs for an all-reduce, as on a device, and DDP is PyTorch's over Gloo.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import destinations
from jobs import HERE, OURS, HostGroup, run_job
from measuring import machine, report, table

METHODS: dict[str, tuple[str, ...]] = {
    "DDP": ("--every-step",),
    "SlowMo": (),
    "SlowMo(delay=5)": ("--delay", "5"),
    "SlowMo(delay=2, fragments=4)": ("--delay", "2", "--fragments", "4"),
    "SlowMo(int8)": ("--wire-dtype", "int8"),
    "SlowMo(int4)": ("--wire-dtype", "int4"),
    "SlowMo(int4, delay=1)": ("--wire-dtype", "int4", "--delay", "1"),
}
"""Options of ``peers/language.py`` by method."""
PERIOD = 16
RATIO = 4.0
"""Of the seconds that an all-reduce takes to those that an iteration computes."""
RATE = 1e8
PARAMETERS = 1_030_400
PROGRAM = "language.py"
Run: TypeAlias = dict[str, Any]


def measured(options: argparse.Namespace, group: HostGroup | None, method: str, seed: int) -> Run:
    """The result of one run, which is done now if it has not been done before."""
    arguments = ["--seed", str(seed), "--steps", str(options.steps), *METHODS[method]]
    if group is None:
        where, arguments = "simulated", ["--workers", str(options.workers), *arguments]
        command = [sys.executable, str(HERE / "peers" / PROGRAM), "simulated", *arguments]
    else:
        where = f"{group.hosts}_hosts_{group.rate / 1e6:g}_Mbit"
        arguments = ["--compute-seconds", f"{compute_seconds(group):.4f}", *arguments]
        command = group.command("Gloo" if method == "DDP" else OURS, PROGRAM, arguments)
    file = options.runs / f"{where}_{'_'.join(argument.removeprefix('--') for argument in arguments)}.json"
    if not file.exists():
        file.write_text(json.dumps(run_job(command, options.job_seconds)))
    found: Run = json.loads(file.read_text())
    print(f"{where}, {method}, seed {seed}: loss {found['loss']:.4f}, {found['bytes_sent'] / 1e6:.2f} MB", flush=True)
    return found


def compute_seconds(group: HostGroup) -> float:
    """What an iteration computes at least."""
    return group.limit_seconds(4 * PARAMETERS) / RATIO


def losses_and_bytes(by_method: Mapping[str, Sequence[Run]], is_timed: bool) -> str:
    """A table: a row for each method."""
    sent = {method: runs[0]["bytes_sent"] for method, runs in by_method.items()}
    full = statistics.mean(run["loss"] for run in by_method["SlowMo"]) if "SlowMo" in by_method else None
    rows = []
    for method, runs in by_method.items():
        losses = [run["loss"] for run in runs]
        spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        mean = statistics.mean(losses)
        row = [
            method,
            f"{mean:.4f}",
            spread,
            f"{100 * (mean / full - 1):+.2f} %" if full else "",
            f"{sent[method] / 1e6:.2f}",
        ]
        row.append(f"{sent['DDP'] / sent[method]:.1f}" if "DDP" in sent else "")
        if is_timed:
            row.append(f"{min(run['points'][-1][1] for run in runs):.1f}")
        rows.append(row)
    header = ["method", "validation loss", "standard deviation", "to SlowMo's", "MB sent by a rank", "times fewer"]
    return table([*header, *(["seconds"] if is_timed else [])], rows)


def draw(found: Mapping[str, Mapping[str, Sequence[Run]]], file: Path) -> None:
    """Validation loss of rank 0's replica against bytes, and against seconds over links: the mean of the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(where, column) for where in found for column in ((2,) if "simulated" in where else (2, 1))]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for (where, column), panel in zip(panels, axes[0], strict=True):
        for method, runs in found[where].items():
            points = list(zip(*(run["points"] for run in runs), strict=True))
            across = [min(point[column] for point in same) for same in points]
            if column == 2:  # each round sends the same, some of it after its end
                across = [runs[0]["bytes_sent"] * (number + 1) / len(points) for number in range(len(points))]
            losses = [[point[3] for point in same] for same in points]
            unit = 1e6 if column == 2 else 1
            x = [each / unit for each in across]
            (line,) = panel.plot(x, list(map(statistics.mean, losses)), ".-", label=method)
            panel.fill_between(x, list(map(min, losses)), list(map(max, losses)), color=line.get_color(), alpha=0.2)
        panel.set(xlabel="MB sent by a rank" if column == 2 else "seconds", xscale="log", title=where)
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation loss")
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=2 * len(panels), fontsize="small")
    figure.savefig(file)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", nargs="+", choices=["simulated", "links"], default=["simulated"])
    parser.add_argument("--workers", type=int, default=8, help="simulated (default %(default)s)")
    parser.add_argument("--hosts", type=int, default=4, help="behind links (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=144, help=f"a multiple of {PERIOD} (default %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=destinations.folder, default="build/quantized", help="(default %(default)s)")
    parser.add_argument("--job-seconds", type=float, default=1200, help="limit of a run (default %(default)s)")
    parser.add_argument("--results", type=destinations.folder, help="append the table there, and draw the picture")
    options = parser.parse_args()
    links = HostGroup(options.hosts, 1, RATE)
    places: dict[str, HostGroup | None] = {}
    if "simulated" in options.places:
        places[f"{options.workers} simulated workers"] = None
    if "links" in options.places:
        places[str(links)] = links
    found: dict[str, dict[str, list[Run]]] = {}
    for place, group in places.items():
        found[place] = {method: [] for method in options.methods}
        for seed in options.seeds:
            for method, runs in found[place].items():
                runs.append(measured(options, group, method, seed))
    tables = [
        f"{place}:\n\n{losses_and_bytes(runs, is_timed='simulated' not in place)}" for place, runs in found.items()
    ]
    about = (
        f"A transformer of {PARAMETERS:,} parameters, {options.steps} steps of AdamW, {len(options.seeds)} seeds. "
        f"SlowMo has a period of {PERIOD} and a slow momentum of 0.5. Validation loss in nats for each character, of "
        f"the average of all replicas at the end; mean and standard deviation over seeds. {machine()}."
    )
    if "links" in options.places:
        about += (
            f" Over links, an iteration computes for {1e3 * compute_seconds(links):.0f} ms; the link needs {RATIO:g} "
            "times as long for an all-reduce; seconds are those of the fastest seed."
        )
    report("\n\n".join([*tables, about]), options.results and options.results / "quantized.md")
    if options.results:
        draw(found, options.results / "quantized.png")


if __name__ == "__main__":
    main()
