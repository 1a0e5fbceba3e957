"""The consensus error after k gossip rounds, measured through messages and compared with theory.

    python benchmarks/consensus.py                           # n = 8, 12, 32, 33, 256
    python benchmarks/consensus.py --sizes 8 64 --plot consensus.png --markdown consensus.md

Every rank starts from its own unit vector and runs push-sum over the simulator. After k rounds the rows z_i of all
ranks form the product of k mixing matrices. Its distance from the exact average, ||Z - 11'/n|| in the spectral norm, is
the consensus error: 1 at the start, and the worst case over all initial values. Where theory has a closed form, the
measured error is equal to it.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import cos, isqrt, log2, pi
from pathlib import Path

import destinations
import numpy as np
from numpy.typing import NDArray

from lentando.comm.errors import ConfigurationError
from lentando.comm.simulation import SimulatedTransport, simulate
from lentando.comm.topology import (
    BipartiteExponential,
    Complete,
    GraphSequence,
    Hypercube,
    OnePeerExponential,
    OnePeerHypercube,
    PPeerExponential,
    Ring,
    StaticExponential,
    Topology,
    Torus,
)

SIZES = (8, 12, 32, 33, 256)
ROUNDS = (1, 2, 4)
"""Rounds at which the error is printed, in multiples of ceil(log2 n)."""
ZERO = 1e-14
"""Below this an error is rounding."""

Matrix = NDArray[np.float64]
Theory = Callable[[int, int], float]
"""Error after k rounds among n ranks: ``theory(n, k)``."""


def ring(size: int, rounds: int) -> float:
    """Eigenvalues (1 + 2 cos(2 pi m / n)) / 3; with 2 ranks the neighbours are one."""
    if size <= 2:
        return 0.0
    return max(abs(1 + 2 * cos(2 * pi * m / size)) / 3 for m in range(1, size)) ** rounds


def torus(size: int, rounds: int) -> float:
    """Eigenvalues (1 + s_r(a) + s_c(b)) / (1 + degree), with s the sum of an axis' characters."""
    rows = next(r for r in range(isqrt(size), 0, -1) if size % r == 0)
    axes = [(length, min(length - 1, 2)) for length in (rows, size // rows)]
    degree = sum(edges for _, edges in axes)

    def axis(number: int, m: int) -> float:
        length, edges = axes[number]
        return edges * cos(2 * pi * m / length)

    moduli = [
        abs(1 + axis(0, a) + axis(1, b)) / (1 + degree) for a in range(rows) for b in range(size // rows) if a or b
    ]
    return max(moduli, default=0.0) ** rounds


def exponential(peers: int | None) -> Theory:
    """Products over the rounds of |sum of characters of the hops|; None: all powers of 2 in every round.

    For one peer this is prod_k |cos(pi m 2^k / n)|, which is 0 for all m as soon as n divides 2^k.
    """

    def theory(size: int, rounds: int) -> float:
        if peers is None:
            steps = [[1 << power for power in range((size - 1).bit_length())]]
        else:
            places = next(k for k in range(1, 64) if (peers + 1) ** k >= size)
            steps = [[digit * (peers + 1) ** place for digit in range(1, peers + 1)] for place in range(places)]
        steps = [sorted({hop % size for hop in hops} - {0}) for hops in steps]
        character = np.exp(2j * pi * np.outer(np.arange(size), np.arange(1, size)) / size)
        moduli = np.array([np.abs(1 + character[hops].sum(axis=0)) / (1 + len(hops)) for hops in steps])
        taken = np.bincount(np.arange(rounds) % len(steps), minlength=len(steps))
        return float(np.prod(moduli ** taken[:, np.newaxis], axis=0).max(initial=0.0))

    return theory


def hypercube(size: int, rounds: int) -> float:
    """rho = 1 - 2 / (1 + log2 n)."""
    return (1 - 2 / (1 + log2(size))) ** rounds


def one_peer_hypercube(size: int, rounds: int) -> float:
    """Half of the disagreement is gone with each digit, for those it concerns; all after log2 n rounds."""
    return 1.0 if rounds < log2(size) else 0.0


@dataclass(frozen=True)
class Entry:
    """A topology, and what theory says of it; None where there is no closed form."""

    topology: Topology
    theory: Theory | None


ENTRIES = {
    "ring": Entry(Ring(), ring),
    "torus": Entry(Torus(), torus),
    "bipartite exponential": Entry(BipartiteExponential(), None),
    "static exponential": Entry(StaticExponential(), exponential(None)),
    "one-peer exponential": Entry(OnePeerExponential(), exponential(1)),
    "2-peer exponential": Entry(PPeerExponential(2), exponential(2)),
    "hypercube": Entry(Hypercube(), hypercube),
    "one-peer hypercube": Entry(OnePeerHypercube(), one_peer_hypercube),
    "complete": Entry(Complete(), lambda size, rounds: 0.0),
}


def measured_errors(graphs: GraphSequence, rounds: Sequence[int]) -> list[float]:
    """Consensus error after each number of rounds, from one simulation of push-sum."""
    size = graphs.size
    snapshots = {number: np.empty((size, size)) for number in rounds}

    def worker(transport: SimulatedTransport) -> None:
        state = np.zeros(size + 1)
        state[transport.rank] = state[size] = 1.0
        for step in range(max(rounds)):
            peers = graphs.peers(transport.rank, step)
            received = [(peer, np.empty_like(state)) for peer, _ in peers.in_neighbors]
            transport.exchange([(peer, share * state) for peer, share in peers.out_neighbors], received).wait()
            state *= peers.self_weight
            for _, array in received:
                state += array
            if step + 1 in snapshots:
                snapshots[step + 1][transport.rank] = state[:size] / state[size]

    simulate(worker, size, check_buffers=False)
    return [float(np.linalg.norm(snapshots[number] - 1 / size, 2)) for number in rounds]


@dataclass(frozen=True)
class Row:
    """One topology at one size."""

    size: int
    topology: str
    messages: str
    rate: float
    rounds: tuple[int, ...]
    measured: tuple[float, ...]
    theory: tuple[float | None, ...]


def measure(size: int) -> Iterable[Row]:
    """The rows of all topologies that a world of ``size`` ranks can have."""
    base = max(1, (size - 1).bit_length())
    rounds = tuple(base * multiple for multiple in ROUNDS)
    for name, entry in ENTRIES.items():
        try:
            graphs = entry.topology.for_size(size)
        except ConfigurationError:
            continue  # a hypercube needs a power of 2
        degrees = {len(graphs.peers(rank, step).out_neighbors) for rank in range(size) for step in range(graphs.phases)}
        needed = rounds if name != "complete" else rounds[:1]  # once exact, always exact: n - 1 messages are enough
        measured = measured_errors(graphs, needed)
        yield Row(
            size,
            name,
            "-".join(str(degree) for degree in sorted({min(degrees), max(degrees)})),
            1 - graphs.spectral_gap,
            rounds,
            tuple(measured + measured[-1:] * (len(rounds) - len(needed))),
            tuple(None if entry.theory is None else entry.theory(size, number) for number in rounds),
        )


HEADINGS = (
    "n",
    "topology",
    "messages per rank and round",
    "rho",
    *(f"{what} k = {multiple}K" for multiple in ROUNDS for what in ("measured", "theory")),
)


def cells(row: Row) -> list[str]:
    """Return the cells of a row as text."""
    errors = [text for pair in zip(row.measured, row.theory, strict=True) for text in map(_error, pair)]
    return [str(row.size), row.topology, row.messages, f"{row.rate:.4f}", *errors]


def _error(value: float | None) -> str:
    if value is None:
        return "-"
    return "exact" if value < ZERO else f"{value:.3e}" if value < 1e-3 else f"{value:.5f}"


def as_text(rows: Sequence[Row]) -> str:
    """The table with aligned columns."""
    table = [list(HEADINGS), *map(cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown, with what it means."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([EXPLANATION, "", *lines, ""])


EXPLANATION = (
    "Consensus error ||Z_k - 11'/n|| after k rounds of push-sum from unit vectors, K = ceil(log2 n); 1 at the start. "
    "rho: shrinkage per round in the long run, from the eigenvalues. "
    f"exact: below {ZERO:g}. -: no closed form."
)


def plot(sizes: Sequence[int], path: Path) -> None:
    """Error over rounds, one panel per size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(sizes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for panel, size in zip(panels, sizes, strict=True):
        last = 4 * max(1, (size - 1).bit_length())
        for number, (name, entry) in enumerate(ENTRIES.items()):
            try:
                graphs = entry.topology.for_size(size)
            except ConfigurationError:
                continue
            products, product = [np.eye(size)], np.eye(size)
            for step in range(last):
                product = graphs.mixing_matrix(step) @ product
                products.append(product)
            errors = [max(float(np.linalg.norm(each - 1 / size, 2)), 1e-17) for each in products]
            style = "--" if number % 2 else "-"
            panel.semilogy(range(last + 1), errors, style, color=f"C{number}", label=name)
        panel.set(title=f"n = {size}", xlabel="rounds", ylim=(1e-9, 2))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("consensus error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="numbers of ranks, each >= 2")
    parser.add_argument("--markdown", type=destinations.file, metavar="FILE", help="write the table there, too")
    parser.add_argument(
        "--plot", type=destinations.file, metavar="FILE", help="draw the error over rounds (.png, .pdf, .svg)"
    )
    options = parser.parse_args(arguments)
    if min(options.sizes) < 2:
        parser.error("disagreement needs at least 2 ranks")
    began = time.perf_counter()
    rows = [row for size in options.sizes for row in measure(size)]
    print(EXPLANATION, as_text(rows), sep="\n\n")
    print(f"\n{time.perf_counter() - began:.1f} s")
    if options.markdown is not None:
        options.markdown.write_text(as_markdown(rows))
    if options.plot is not None:
        plot(options.sizes, options.plot)


if __name__ == "__main__":
    main()
