"""Training in a timeline: outer steps, averages of gradients and gossip, with their steps and bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy_model import Worker

from lentando.comm import operations
from lentando.comm.transport import Transport
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.gossip import SGP
from lentando.optimizers.rules.local_sgd import LocalSGD


@pytest.mark.parametrize(
    ("base", "period", "name", "steps"),
    [
        (LocalSGD(), 4, "OUTER_STEP", [4, 8]),
        (AllReduce(), None, "AVERAGE_GRADIENTS", list(range(1, 9))),
        (SGP(), None, "GOSSIP", list(range(1, 9))),
    ],
)
def test_communication_of_training_is_recorded(
    transport: Transport, shared_path: Path, base: BaseAlgorithm, period: int | None, name: str, steps: list[int]
) -> None:
    path = shared_path / "timeline.json"
    worker = Worker(transport, lambda _rank, _step, x: 0.0 * x, np.zeros(1000), lambda _: 0.1, base=base, period=period)
    operations.start_timeline(path)
    worker.run(8)
    operations.stop_timeline()
    own = path.with_name(f"timeline.rank{transport.rank}.json") if transport.rank else path
    found = [event["args"] for event in json.loads(own.read_text()) if event["name"] == name]
    assert [args["inner step"] for args in found][: len(steps)] == steps
    if transport.size > 1:
        assert all(args["bytes sent"] >= 1000 for args in found)
