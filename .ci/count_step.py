"""Count the files whose functions run in one ``SlowMo.step()`` of PyTorch, between outer steps and at an outer step.

Run on one rank, or on two: ``mpirun -np 2 python .ci/count_step.py``. Rank 0 prints the files of this project, with the
functions of each; the files that handle the training loss, from ``step(loss=...)`` to the period (on one rank, where
the mean over the ranks is the loss itself); and how many methods ``Replica`` has. Function calls are recorded with
``sys.setprofile``. ``tests/torch/test_step_files.py`` checks the counts.
"""

import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

import torch

import lentando
import lentando.torch as lt
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica.between_steps import BetweenSteps
from lentando.optimizers.rules.period import RoundSummary

PERIOD = 4
LOSS = 0.7109375
"""Loss of every step, whose mean over a round is exactly the same number, and which is no other number of a step."""
PLACES = {
    "optimizers/rules/": "rules",
    "optimizers/replica/": "order of a step and policies",
    "optimizers/": "shared by the frameworks",
    "torch/": "adapter",
    "comm/": "communication",
}
"""What the files of a folder hold, by the beginning of their paths."""
FilesOfFunctions = dict[str, set[str]]


def functions_called(function: Callable[[], object]) -> tuple[FilesOfFunctions, FilesOfFunctions]:
    """Names of functions of this project that a call runs, by file: all, and those that handle the loss."""
    codes: set[CodeType] = set()
    with_loss: set[CodeType] = set()

    def record(frame: FrameType, event: str, result: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)
        elif event == "return" and any(map(_holds_loss, [result, *frame.f_locals.values()])):
            with_loss.add(frame.f_code)

    sys.setprofile(record)
    function()
    sys.setprofile(None)
    return _by_file(codes), _by_file(with_loss)


def _holds_loss(value: object) -> bool:
    """Whether this is the loss of a step or of a round, or a summary of the round, not a message with all numbers."""
    loss = value.loss if isinstance(value, RoundSummary) else value
    return isinstance(loss, float) and loss in (LOSS, PERIOD * LOSS)


def _by_file(codes: Iterable[CodeType]) -> FilesOfFunctions:
    root = lentando.__path__[0]
    files: FilesOfFunctions = defaultdict(set)
    for code in codes:
        if code.co_filename.startswith(root):
            files[code.co_filename[len(root) + 1 :]].add(code.co_name)
    return files


def _report(where: str, files: FilesOfFunctions) -> None:
    by_place = Counter(next(place for folder, place in PLACES.items() if name.startswith(folder)) for name in files)
    print(f"{where}: {len(files)} files ({', '.join(f'{place} {by_place[place]}' for place in by_place)})")
    for name, functions in sorted(files.items()):
        print(f"    {name}: {', '.join(sorted(functions))}")


def main() -> None:
    """Print the counts on rank 0."""
    lt.init()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.125), model=model, period=PERIOD)
    of_loss: FilesOfFunctions = defaultdict(set)
    for number in range(1, 3 * PERIOD + 1):  # the first steps set up what later ones use
        optimizer.zero_grad()
        model(torch.ones(2, 4) * (1 + lt.rank())).sum().backward()
        loss = torch.tensor(LOSS + lt.rank())
        if number not in (3 * PERIOD - 1, 3 * PERIOD):
            optimizer.step(loss=loss)
            continue
        files, with_loss = functions_called(lambda: optimizer.step(loss=loss))  # noqa: B023 - called at once
        for name, functions in with_loss.items():
            of_loss[name] |= functions
        if lt.rank() == 0:
            _report("at an outer step" if number == 3 * PERIOD else "between outer steps", files)
    if lt.rank() == 0:
        if lt.size() == 1:
            _report("with the loss", of_loss)
        for kind in (Replica, BetweenSteps):
            own = vars(kind).values()
            methods = sum(inspect.isfunction(item) for item in own)
            properties = sum(isinstance(item, property) for item in own)
            print(f"{kind.__name__}: {methods} methods and {properties} properties")
    lt.shutdown()


if __name__ == "__main__":
    main()
