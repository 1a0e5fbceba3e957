"""A training that stops on one number of ranks and continues on another; a test reads what each rank holds.

Run under mpirun: ``resized_training.py FRAMEWORK save|load FOLDER METHOD:STEP...``. ``save`` trains from the beginning;
for every method it saves at each step, and ends at ``LAST``. ``load`` loads each, and continues the last of them.
"""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROUND, LAST, FEATURES, BATCH = 3, 60, 5, 64
RATE, MOMENTUM, SLOW_MOMENTUM = 0.03125, 0.5, 0.25
TRUE_WEIGHTS = np.arange(1.0, FEATURES + 1) / FEATURES


def batch(rank: int, step: int) -> tuple[Any, Any]:
    """Of a rank at a step: noisy, so that the loss does not become zero."""
    generator = np.random.default_rng([rank, step])
    features = generator.normal(size=(BATCH, FEATURES))
    return features, (features @ TRUE_WEIGHTS + generator.normal(size=BATCH))[:, None]


def settings(lt: Any, method: str) -> dict[str, Any]:
    slow = {"outer": lt.SlowMomentum(1.0, SLOW_MOMENTUM), "period": ROUND}
    osgp = lt.OSGP(lt.StaticExponential(), staleness=2, deterministic=True)
    found: dict[str, dict[str, Any]] = {
        "allreduce": {},
        "adacomm": {"base": lt.LocalSGD(), "period": lt.AdaptivePeriod(4, interval_steps=4)},
        "slowmo": {"base": lt.LocalSGD(), **slow},
        "slowmo in int8": {"base": lt.LocalSGD(), "wire_dtype": "int8", **slow},
        "diloco": {"base": lt.LocalSGD(), "outer": lt.OuterSGD(1.0, SLOW_MOMENTUM), "period": ROUND},
        "slowmo by ring": {"base": lt.LocalSGD(), "algorithm": "ring", **slow},
        "slowmo without average": {"base": lt.SGP(), "exact_average": False, **slow},
        "sgp": {"base": lt.SGP(lt.Ring())},
        "osgp": {"base": osgp},
        "osgp in bfloat16": {"base": replace(osgp, wire_dtype="bfloat16")},
        "slowmo over osgp": {"base": osgp, "base_buffers": "average", **slow},
    }
    return found[method]


class TorchRun:
    def __init__(self, method: str, seed: int) -> None:
        import torch

        import lentando.torch as lt

        self.torch, self.lt = torch, lt
        torch.manual_seed(seed)
        linear = torch.nn.Linear(FEATURES, 1, bias=False)
        if method != "slowmo":
            linear = torch.nn.Sequential(torch.nn.BatchNorm1d(FEATURES), torch.nn.Linear(FEATURES, 1))
        self.model = linear.double()
        if "osgp" in method:
            base: Any = torch.optim.Adam(self.model.parameters(), lr=RATE / 2)
        else:
            base = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=MOMENTUM)
        self.optimizer = lt.DistributedOptimizer(base, model=self.model, **settings(lt, method))
        with torch.no_grad():
            if method == "slowmo":
                self.model.weight.zero_()

    def step(self, features: Any, targets: Any) -> None:
        self.optimizer.zero_grad()
        loss = self.loss(features, targets)
        loss.backward()
        self.optimizer.step(loss=loss)

    def loss(self, features: Any, targets: Any) -> Any:
        predicted = self.model(self.torch.from_numpy(features))
        return (predicted - self.torch.from_numpy(targets)).square().mean() / 2

    def loss_of_average(self, features: Any, targets: Any) -> float:
        with self.optimizer.averaged():
            return float(self.loss(features, targets).detach())

    def tensors(self) -> dict[str, Any]:
        found = {f"model {name}": tensor.numpy().copy() for name, tensor in self.model.state_dict().items()}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                found[f"optimizer {key} {names[parameter]}"] = value.numpy().copy()
        return found


class KerasRun:
    def __init__(self, method: str, seed: int) -> None:
        import keras
        import tensorflow as tf

        import lentando.tensorflow as lt

        self.tf, self.lt = tf, lt
        keras.config.set_floatx("float64")
        keras.utils.set_random_seed(seed)
        layers = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
        self.model = keras.Sequential([keras.Input((FEATURES,)), *layers])
        base = keras.optimizers.Adam(RATE / 2) if "osgp" in method else keras.optimizers.SGD(RATE, MOMENTUM)
        self.optimizer = lt.DistributedOptimizer(base, model=self.model, **settings(lt, method))

    def step(self, features: Any, targets: Any) -> None:
        variables = self.model.trainable_variables
        with self.tf.GradientTape() as tape:
            loss = self.loss(features, targets)
        self.optimizer.apply(tape.gradient(loss, variables), variables, loss=loss)

    def loss(self, features: Any, targets: Any) -> Any:
        predicted = self.model(self.tf.constant(features), training=True)
        return self.tf.reduce_mean((predicted - self.tf.constant(targets)) ** 2) / 2

    def loss_of_average(self, features: Any, targets: Any) -> float:
        with self.optimizer.averaged():
            return float(self.loss(features, targets))

    def tensors(self) -> dict[str, Any]:
        found = {f"model {variable.path}": variable.numpy() for variable in self.model.weights}
        for number, variable in enumerate(self.optimizer.base_optimizer.variables):
            found[f"optimizer {number} {variable.path}"] = np.asarray(variable.numpy())
        return found


def held(run: Any, **about: Any) -> dict[str, Any]:
    """All that a rank holds, as arrays by name, and ``about``."""
    state = run.optimizer.training().replica.state_dict()
    arrays = run.tensors()
    for name, flat in (state["outer"] or {}).items():
        for number, array in enumerate(flat["flat"]):
            if array is not None:
                arrays[f"{name} {number}"] = array
                arrays[f"{name} {number} start"] = np.array(-1 if flat["starts"] is None else flat["starts"][number])
    if state["base"]:
        arrays["weight"] = np.array(state["base"]["weight"])
        arrays["in flight"] = np.array(len(state["base"]["under_way"]))
        in_flight = [m["shares"]["flat"] for r in state["base"]["under_way"] for m in r["messages"]]
        arrays["sum"] = sum((shares[0] for shares in in_flight), start=state["base"]["biased"]["flat"][0])
    counted = ("inner_steps", "rounds", "steps", "steps_in_round", "period", "rate_sums", "loss_sum", "loss_count")
    arrays["about"] = np.array(json.dumps({key: state[key] for key in counted} | about))
    return arrays


def left(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each rank of a job has left, by rank."""
    found = []
    for rank in range(len(list((folder / name).iterdir()))):
        arrays = dict(np.load(folder / name / f"{rank}.npz"))
        found.append(arrays | {"about": json.loads(str(arrays["about"]))})
    return found


def whole(ranks: list[dict[str, Any]], name: str) -> Any:
    """Shards, put together where they begin."""
    pieces = [(int(arrays[f"{name} start"]), arrays[name]) for arrays in ranks]
    assert min(start for start, _ in pieces) == 0
    found = np.full(sum(array.size for _, array in pieces), np.nan)
    for start, array in pieces:
        found[start : start + array.size] = array
    assert np.isfinite(found).all()
    return found


def main(framework: str, action: str, where: str, *wanted: str) -> None:
    make: Callable[[str, int], Any] = TorchRun if framework == "torch" else KerasRun
    if framework == "torch":
        import lentando.torch as lt
    else:
        import lentando.tensorflow as lt  # type: ignore[no-redef]

    lt.init()
    folder, rank, size = Path(where), lt.rank(), lt.size()
    received: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: received.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lentando").addHandler(handler)
    every = [batch(9, step) for step in range(64)]
    everything = np.concatenate([x for x, _ in every]), np.concatenate([y for _, y in every])

    def write(run: Any, name: str, **about: Any) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        np.savez(folder / name / f"{rank}.npz", **held(run, **about))

    for method, steps in (one.split(":") for one in wanted):
        moments = [int(step) for step in steps.split(",")]
        if action == "save":
            run = make(method, 0)
            for step in range(LAST):
                if step in moments:
                    write(run, f"{method} {step} on {size}")
                    lt.save(folder / f"{method} {step} by {size}", run.optimizer, {"rank": rank, "step": step})
                run.step(*batch(rank, step))
            write(run, f"{method} end on {size}", loss=run.loss_of_average(*everything))
            continue
        for step in moments:
            (saved,) = folder.glob(f"{method} {step} by *")
            run = make(method, 1 + rank)
            run.step(*batch(rank, 0))  # into a training in flight
            received.clear()
            extra = lt.load(saved, run.optimizer)
            write(run, f"{method} {step} on {size}", extra=extra, received=list(received))
        for later in range(moments[-1], LAST):
            run.step(*batch(rank, later))
        write(run, f"{method} continued on {size}", loss=run.loss_of_average(*everything))


if __name__ == "__main__":
    main(*sys.argv[1:])
