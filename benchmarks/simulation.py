"""How fast the simulator is: push-sum gossip on a small quadratic, one message per rank and step.

python benchmarks/simulation.py                       # 1024 ranks, 1000 steps
python benchmarks/simulation.py --ranks 64 --compute lognormal
"""

import argparse
import platform
import time
from collections.abc import Sequence

import numpy as np

from lentando.comm.simulation import Compute, Network, SimulatedTransport, simulate
from lentando.comm.topology import OnePeerExponential

DIMENSION = 8
LEARNING_RATE = 0.01


def train(transport: SimulatedTransport, steps: int) -> float:
    """Stochastic gradient push towards the mean of the ranks' numbers; the distance that is left."""
    graphs = OnePeerExponential().for_size(transport.size)
    plan = [graphs.peers_in(transport.rank, phase) for phase in range(graphs.phases)]
    target = np.full(DIMENSION, float(transport.rank))
    state = np.zeros(DIMENSION + 1)  # x and w
    state[-1] = 1.0
    sent, received, gradient = np.empty_like(state), np.empty_like(state), np.empty(DIMENSION)
    for step in range(steps):
        transport.compute()
        np.divide(state[:-1], state[-1], out=gradient)
        gradient -= target
        gradient *= LEARNING_RATE
        state[:-1] -= gradient
        peers = plan[graphs.phase(step)]
        if not peers.out_neighbors:
            continue
        ((receiver, share),), ((sender, _),) = peers.out_neighbors, peers.in_neighbors
        np.multiply(state, share, out=sent)
        state *= peers.self_weight
        transport.exchange([(receiver, sent)], [(sender, received)]).wait()
        state += received
    return float(np.abs(state[:-1] / state[-1] - (transport.size - 1) / 2).max())


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024, metavar="N")
    parser.add_argument("--steps", type=int, default=1000, metavar="K")
    parser.add_argument("--compute", choices=["constant", "exponential", "lognormal"], default="exponential")
    options = parser.parse_args(arguments)
    compute = Compute(0.1, options.compute)
    began = time.perf_counter()
    left = simulate(
        lambda transport: train(transport, options.steps), options.ranks, network=Network(), compute=compute
    )
    seconds = time.perf_counter() - began
    each = seconds / (options.ranks * options.steps)
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    print(f"{options.ranks} ranks, {options.steps} steps, {options.compute} compute times")
    print(f"{seconds:.1f} s, {each * 1e6:.0f} us per rank and step; farthest rank {max(left):.3g} from the optimum")


if __name__ == "__main__":
    main()
