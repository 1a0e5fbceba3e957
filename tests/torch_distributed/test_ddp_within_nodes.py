"""examples/ddp_within_nodes.py: gradients are averaged within a node, parameters between the nodes by SlowMo."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from case_selection import selected_cases
from launchers import OPEN_MPI, TORCHRUN, Launcher
from numpy.typing import NDArray

EXAMPLE = Path(__file__).parents[2] / "examples/ddp_within_nodes.py"
NODES, RANKS_PER_NODE = 2, 2
LEARNING_RATE, MOMENTUM, SLOW_MOMENTUM, PERIOD, STEPS = 0.1, 0.9, 0.5, 4, 24


@pytest.mark.parametrize(
    "launcher", selected_cases([OPEN_MPI], [OPEN_MPI, TORCHRUN]), ids=lambda launcher: launcher.name
)
def test_each_half_does_what_it_should(launcher: Launcher) -> None:
    """Over backend lentando, and over Gloo."""
    arguments = (str(EXAMPLE), "--ranks-per-node", str(RANKS_PER_NODE))
    job = launcher.run(NODES * RANKS_PER_NODE, *arguments, timeout_seconds=250, prepared="lentando.torch")
    assert job.status == 0, job.output
    found = {
        int(rank): np.fromstring(f"{weights}, {bias}", sep=", ")
        for rank, weights, bias in re.findall(r"rank (\d): weights \[([^]]*)\], bias ([-+.e\d]+)", job.output)
    }
    assert set(found) == set(range(NODES * RANKS_PER_NODE)), job.output
    for rank, values in found.items():
        np.testing.assert_array_equal(values, found[0], err_msg=f"rank {rank}")  # the last step ends a round
    np.testing.assert_allclose(found[0], reference(), rtol=1e-4)


def reference() -> NDArray[np.float64]:
    """Weights and bias by the formulas: DDP on each node, and SlowMo (Wang et al., ICLR 2020, algorithm 1) over nodes.

    The momentum of the inner optimizer is reset at the end of a round.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1)
    start = np.append(layer.weight.detach().numpy()[0], layer.bias.detach().numpy()).astype(np.float64)
    streams = [torch.Generator().manual_seed(rank) for rank in range(NODES * RANKS_PER_NODE)]
    anchor, slow_momentum = start.copy(), np.zeros(5)
    models, velocities = [start.copy() for _ in range(NODES)], [np.zeros(5) for _ in range(NODES)]
    for step in range(STEPS):
        for node in range(NODES):
            ranks = range(node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE)
            gradient = np.mean([gradient_of(models[node], streams[rank]) for rank in ranks], axis=0)
            velocities[node] = MOMENTUM * velocities[node] + gradient
            models[node] = models[node] - LEARNING_RATE * velocities[node]
        if (step + 1) % PERIOD == 0:
            difference = (anchor - np.mean(models, axis=0)) / LEARNING_RATE
            slow_momentum = SLOW_MOMENTUM * slow_momentum + difference
            anchor = anchor - LEARNING_RATE * slow_momentum
            models, velocities = [anchor.copy() for _ in range(NODES)], [np.zeros(5) for _ in range(NODES)]
    return models[0]


def gradient_of(model: NDArray[np.float64], stream: torch.Generator) -> NDArray[np.float64]:
    inputs = torch.randn(8, 4, generator=stream).numpy().astype(np.float64)
    with_bias = np.hstack([inputs, np.ones((8, 1))])
    gradient: NDArray[np.float64] = 2 / 8 * with_bias.T @ (with_bias @ model - inputs.sum(axis=1))
    return gradient
