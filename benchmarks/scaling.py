"""The time of a training step of each algorithm by number of workers, on paper and in the simulator; and a picture.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --model-size 100MB --bandwidth 1.25e9 --results benchmarks/results

Latency and bandwidth are those that `lentando measure` found on four hosts of `benchmarks/cluster` at 1 Gbit/s. Lines
are the delay model's, from 4 to 4096 workers. Crosses are trainings of a PyTorch model on simulated ranks, of which
every message was sent; they stop where the simulator would take minutes. Printed is also where one algorithm
overtakes another.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import destinations
import torch
from all_reduce import in_words, number_of_bytes
from measuring import machine, report, table
from torch import nn
from tqdm import tqdm

import lentando.torch as lt
from lentando.comm.simulation import Compute, Network, simulate
from lentando.comm.topology import OnePeerExponential
from lentando.comm.world import transport
from lentando.optimizers.planning import (
    all_reduce_seconds,
    gossip_rate,
    local_sgd_seconds,
    network_delays,
)

SIZES = [2**power for power in range(2, 13)]
PERIOD = 12
STEPS = 2 * PERIOD
Wrap = Callable[[torch.optim.Optimizer, nn.Module], torch.optim.Optimizer]
ALGORITHMS: dict[str, tuple[Wrap, int]] = {
    "AllReduce": (lambda sgd, model: lt.DistributedOptimizer(sgd, model=model), 32),
    f"SlowMo({PERIOD})": (lambda sgd, model: lt.SlowMo(sgd, model=model, period=PERIOD), 64),
    "SGP": (lambda sgd, model: lt.DistributedOptimizer(sgd, model=model, base=lt.SGP()), 128),
    "OSGP": (lambda sgd, model: lt.DistributedOptimizer(sgd, model=model, base=lt.OSGP()), 128),
}
"""How each is made, and up to how many simulated workers."""


def on_paper(compute: Compute, network: Network, model_bytes: int) -> dict[str, dict[int, float]]:
    """Seconds per step by algorithm and number of workers."""
    found: dict[str, dict[int, float]] = {name: {} for name in ALGORITHMS}
    for size in tqdm(SIZES, desc="delay model", leave=False):
        delays = network_delays(network, size, model_bytes)
        graphs = OnePeerExponential().for_size(size)
        each = (
            all_reduce_seconds(compute, size, delays),
            local_sgd_seconds(compute, size, delays, PERIOD, slow_momentum=True),
            gossip_rate(compute, graphs, delays).seconds,
            gossip_rate(compute, graphs, delays, staleness=1).seconds,
        )
        for name, seconds in zip(ALGORITHMS, each, strict=True):
            found[name][size] = seconds
    return found


def in_simulator(compute: Compute, network: Network, model_bytes: int) -> dict[str, dict[int, float]]:
    """The same of simulated trainings."""
    found: dict[str, dict[int, float]] = {name: {} for name in ALGORITHMS}
    runs = [(name, size) for name, (_, most) in ALGORITHMS.items() for size in SIZES if size <= most]
    for name, size in tqdm(runs, desc="simulator", leave=False):
        wrap, _ = ALGORITHMS[name]

        def train(wrap: Wrap = wrap) -> float:
            lt.init()
            model = nn.Linear(model_bytes // 4, 1, bias=False)
            optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.0), model)
            started = transport().clock()
            for _ in range(STEPS):
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
            return (transport().clock() - started) / STEPS

        found[name][size] = max(simulate(train, size, network=network, compute=compute, check_buffers=False))
    return found


def overtakings(found: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Where the order of two algorithms changes, in words."""
    sentences = []
    for first, second in combinations(found, 2):
        for fewer, more in pairwise(SIZES):
            before, after = (found[first][size] - found[second][size] for size in (fewer, more))
            if before * after < 0:
                winner, loser = (first, second) if before > 0 else (second, first)
                sentences.append(f"{winner} overtakes {loser} between {fewer} and {more} workers.")
    return sentences or ["No algorithm overtakes another."]


def draw(
    file: Path, paper: Mapping[str, Mapping[int, float]], simulated: Mapping[str, Mapping[int, float]], title: str
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, name in enumerate(paper):
        axes.plot(list(paper[name]), [1e3 * each for each in paper[name].values()], color=f"C{number}", label=name)
        crosses = simulated[name]
        axes.plot(list(crosses), [1e3 * each for each in crosses.values()], "x", color=f"C{number}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="workers", ylabel="time per step (ms)", title=title, ylim=(0, None))
    axes.grid(visible=True, alpha=0.25)
    axes.legend(title="lines: delay model\ncrosses: simulated")
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", type=number_of_bytes, default="4MB", help="(default %(default)s)")
    parser.add_argument("--latency", type=float, default=120e-6, help="of a message, seconds (default %(default)g)")
    parser.add_argument("--bandwidth", type=float, default=118e6, help="bytes per second (default %(default)g)")
    parser.add_argument("--compute", type=float, default=0.05, help="mean seconds of a step (default %(default)s)")
    parser.add_argument("--distribution", choices=("constant", "exponential", "lognormal"), default="constant")
    parser.add_argument("--no-simulation", action="store_true", help="the delay model alone")
    parser.add_argument(
        "--results", type=destinations.folder, metavar="FOLDER", help="append the table there, and draw the picture"
    )
    options = parser.parse_args(arguments)
    network = Network(latency_seconds=options.latency, bandwidth_bytes_per_second=options.bandwidth)
    compute = Compute(options.compute, options.distribution)

    paper = on_paper(compute, network, options.model_size)
    simulated: dict[str, dict[int, float]] = {name: {} for name in ALGORITHMS}
    if not options.no_simulation:
        simulated = in_simulator(compute, network, options.model_size)

    def cell(name: str, size: int) -> str:
        seconds = simulated[name].get(size)
        return f"{1e3 * paper[name][size]:.1f}" + ("" if seconds is None else f" ({1e3 * seconds:.1f})")

    rows = [[str(size), *(cell(name, size) for name in ALGORITHMS)] for size in SIZES]
    about = (
        f"model of {in_words(options.model_size)}; a step computes {1e3 * options.compute:g} ms "
        f"({options.distribution}); links of {1e6 * options.latency:g} us and {options.bandwidth / 1e6:g} MB/s"
    )
    caption = f"Time per step in ms, in brackets simulated; {about}. {' '.join(overtakings(paper))} {machine()}."
    file = None if options.results is None else options.results / "scaling.md"
    report(f"{table(['workers', *ALGORITHMS], rows)}\n\n{caption}", file)
    if options.results is not None:
        draw(options.results / f"scaling_{in_words(options.model_size).replace(' ', '')}.png", paper, simulated, about)


if __name__ == "__main__":
    main()
