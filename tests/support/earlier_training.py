"""Training whose checkpoints ``earlier_checkpoints/`` holds: two ranks of an earlier version have saved each.

Their manifests have version 1, in which settings are text. ``expected.json`` holds the weights that the same run had
``MORE`` steps after it had saved, by framework and method, then by rank. To write them again, check out a version of
then, put this file next to it, and run it there:

    mpirun -np 2 python earlier_training.py FOLDER torch
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 5
MORE = 4
FOLDER = Path(__file__).parent / "earlier_checkpoints"

Run = tuple[Any, Callable[[int, int], None], Callable[[], list[list[float]]]]
"""An optimizer; what takes steps from one number to another; and what returns the weights."""


def methods(lt: Any) -> dict[str, Callable[..., Any]]:
    """By name, what wraps a base optimizer.

    Args:
        lt: ``lentando.torch`` or ``lentando.tensorflow``.
    """
    return {
        "slowmo": lambda base, **o: lt.SlowMo(base, period=lt.FixedPeriod(3), **o),
        "osgp": lambda base, **o: lt.SlowMo(base, base=lt.OSGP(deterministic=True), period=3, **o),
        "dpsgd": lambda base, **o: lt.DistributedOptimizer(
            base, base=lt.DPSGD(lt.FromMatrix([[0.75, 0.25], [0.25, 0.75]])), **o
        ),
        "adacomm": lambda base, **o: lt.AdaComm(
            base, initial_period=2, interval_steps=2, warmup_steps=2, slow_momentum=0.25, **o
        ),
    }


def batch(step: int, rank: int) -> tuple[Any, Any]:
    """Inputs of shape (2, 2) and outputs of shape (2, 1), float32."""
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3) / 8 + (step % 3) / 4 - rank / 2
    return numbers[:, :2], numbers[:, 2:]


def torch_run(method: str) -> Run:
    import torch

    import lentando.torch as lt

    model = torch.nn.Linear(2, 1)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    base = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
    optimizer = methods(lt)[method](base, model=model)

    def train(start: int, stop: int) -> None:
        for step in range(start, stop):
            inputs, outputs = map(torch.from_numpy, batch(step, lt.rank()))
            optimizer.zero_grad()
            loss = (model(inputs) - outputs).square().mean()
            loss.backward()
            optimizer.step(loss=loss)

    return optimizer, train, lambda: [p.detach().reshape(-1).tolist() for p in model.parameters()]


def keras_run(method: str) -> Run:
    import keras
    import tensorflow as tf

    import lentando.tensorflow as lt

    dense = keras.layers.Dense(1, kernel_initializer="ones", name="dense")
    model = keras.Sequential([keras.layers.Input((2,)), dense])
    optimizer = methods(lt)[method](keras.optimizers.SGD(0.125, momentum=0.5), model=model)
    optimizer.build(model.trainable_variables)

    def train(start: int, stop: int) -> None:
        for step in range(start, stop):
            inputs, outputs = batch(step, lt.rank())
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(inputs) - outputs) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True), loss=loss)

    return optimizer, train, lambda: [np.reshape(v.numpy(), -1).tolist() for v in model.trainable_variables]


RUNS: dict[str, Callable[[str], Run]] = {"torch": torch_run, "tensorflow": keras_run}


def write(folder: Path, framework: str) -> None:
    """Train, save and train on with every method."""
    import importlib

    lt = importlib.import_module(f"lentando.{framework}")
    lt.init()
    expected = {}
    for method in methods(lt):
        optimizer, train, weights = RUNS[framework](method)
        train(0, STEPS)
        lt.save(folder / framework / method, optimizer, extra={"step": STEPS})
        train(STEPS, STEPS + MORE)
        expected[method] = lt.allgather_object(weights())
    if lt.rank() == 0:
        (folder / framework / "expected.json").write_text(json.dumps(expected, indent=1))


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
