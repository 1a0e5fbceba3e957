"""Count the files whose functions run in one ``SlowMo.step()`` of PyTorch, between outer steps and at an outer step.

Run on two ranks: ``mpirun -np 2 .venv/bin/python .ci/count_step.py``. Rank 0 prints the files of this project, with the
functions of each, and how many methods ``Replica`` has. Function calls are recorded with ``sys.setprofile``.
"""

import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch

import lentando
import lentando.torch as lt
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica.between_steps import BetweenSteps

PERIOD = 4
PLACES = {
    "optimizers/rules/": "rules",
    "optimizers/replica/": "order of a step and policies",
    "optimizers/": "shared by the frameworks",
    "torch/": "adapter",
    "comm/": "communication",
}
"""What the files of a folder hold, by the beginning of their paths."""


def functions_called(function: Callable[[], object]) -> dict[str, set[str]]:
    """Names of the functions of this project that a call runs, by file."""
    codes: set[CodeType] = set()

    def record(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(record)
    function()
    sys.setprofile(None)
    root = lentando.__path__[0]
    files: dict[str, set[str]] = defaultdict(set)
    for code in codes:
        if code.co_filename.startswith(root):
            files[code.co_filename[len(root) + 1 :]].add(code.co_name)
    return files


def main() -> None:
    """Print the counts on rank 0."""
    lt.init()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.125), model=model, period=PERIOD)

    def step() -> None:
        optimizer.step(loss=loss)

    for number in range(1, 3 * PERIOD + 1):  # the first steps set up what later ones use
        loss = model(torch.ones(2, 4) * (1 + lt.rank())).sum()
        optimizer.zero_grad()
        loss.backward()
        if number not in (3 * PERIOD - 1, 3 * PERIOD):
            step()
            continue
        files = functions_called(step)
        if lt.rank() == 0:
            where = "at an outer step" if number == 3 * PERIOD else "between outer steps"
            by_place = Counter(
                next(place for folder, place in PLACES.items() if name.startswith(folder)) for name in files
            )
            print(f"{where}: {len(files)} files ({', '.join(f'{place} {by_place[place]}' for place in by_place)})")
            for name, functions in sorted(files.items()):
                print(f"    {name}: {', '.join(sorted(functions))}")
    if lt.rank() == 0:
        for kind in (Replica, BetweenSteps):
            own = vars(kind).values()
            methods = sum(inspect.isfunction(item) for item in own)
            properties = sum(isinstance(item, property) for item in own)
            print(f"{kind.__name__}: {methods} methods and {properties} properties")
    lt.shutdown()


if __name__ == "__main__":
    main()
