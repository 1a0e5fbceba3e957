"""One program for every launcher: a training that saves now and then, and one rank of it that dies.

`python tests/launchers/dies.py FOLDER METHOD RANK KIND SECONDS`: so many seconds after the first checkpoint the rank
dies, by what KIND says. `--load` in place of the last three loads the newest checkpoint and prints its step.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from numpy_model import Worker

from lentando.comm import world
from lentando.optimizers.checkpoint.loading import load
from lentando.optimizers.checkpoint.optimizer_state import OptimizerState
from lentando.optimizers.checkpoint.saving import save
from lentando.optimizers.replica import Replica
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import SGP

DEATHS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "left": lambda: os._exit(0),
    "crashed": lambda: ctypes.string_at(0),
}
METHODS: dict[str, dict[str, Any]] = {"gradients": {"base": AllReduce()}, "gossip": {"base": SGP(), "period": 4}}


class Training:
    """The least that a checkpoint asks for, of an optimizer and of its training."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    def joined(self) -> None: ...

    def training(self) -> "Training":
        return self

    def optimizer_state(self) -> OptimizerState:
        return OptimizerState("none", {}, None, is_empty=True)

    def check_optimizer_state(self, state: OptimizerState) -> None: ...

    def store_optimizer_state(self, state: OptimizerState) -> None: ...

    def check_neutral_state(self, state: Any) -> None: ...

    def store_neutral_state(self, state: Any) -> None: ...

    def new_optimizer_state(self) -> None: ...

    def random_state(self) -> dict[str, Any]:
        return {}

    def restore_random_state(self, state: Any) -> None: ...

    def layers(self) -> None: ...

    def to_plain(self, extra: Any) -> Any:
        return extra

    def from_plain(self, extra: Any) -> Any:
        return extra


def main() -> None:
    folder, method, *rest = sys.argv[1:]
    world.init()
    worker = Worker(
        world.transport(), lambda rank, step, x: x - rank, np.zeros(50_000), lambda step: 0.01, **METHODS[method]
    )
    training: Any = Training(worker.replica)
    if rest == ["--load"]:
        extra = load(folder, training)
        assert np.isfinite(worker.model.x).all()
        print("LOADED", extra["step"])
        return
    who, kind, seconds = rest
    if world.rank() == int(who):

        def die() -> None:  # wherever the training is at that moment
            while not list(Path(folder).glob("*/checkpoint.json")):
                time.sleep(0.01)
            time.sleep(float(seconds))
            sys.stderr.write(f"DIES {time.time()}\n")
            sys.stderr.flush()
            DEATHS[kind]()

        worker.run(3)
        threading.Thread(target=die, daemon=True).start()
    else:
        worker.run(3)
    while True:
        worker.run(5)
        save(folder, training, {"step": worker.replica.inner_steps}, keep=2)


if __name__ == "__main__":
    main()
