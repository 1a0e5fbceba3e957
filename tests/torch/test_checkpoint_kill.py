"""A process that is killed while it saves: whatever is found afterwards is a checkpoint, whole."""

import json
import subprocess
from pathlib import Path

from prepared_python import prepared_python

PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
import lentando.torch as lt

lt.init()
torch.set_num_threads(1)
where, keep = Path(sys.argv[1]), int(sys.argv[2]) or None

def make():
    model = torch.nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return lt.SlowMo(sgd, model=model, period=2, slow_momentum=0.5)

def train(optimizer, steps):
    for parameter in optimizer.param_groups[0]["params"] * steps:
        parameter.grad = torch.ones_like(parameter)
    for _ in range(steps):
        optimizer.step()

optimizer = make()
train(optimizer, 3)
lt.save(where, optimizer, "earlier", keep=keep)
train(optimizer, 1)

def save_and_die(moment):
    # Every change to the file system that Python makes is announced to audit hooks before it is made.
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        changes = event.startswith("os.r") or event == "os.mkdir" or event == "open" and "w" in str(arguments[1])
        if changes and str(where) in str(arguments[0]):
            if seen == moment:
                os._exit(9)
            seen += 1
    sys.addaudithook(hook)
    lt.save(where, optimizer, "later", keep=keep)
    os._exit(0)

found, statuses = [], []
while not statuses or statuses[-1] == 9:
    child = os.fork()
    if child == 0:
        save_and_die(len(statuses))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    again = make()
    found.append(lt.load(where, again))
    assert again.report()["inner_steps"] == (3 if found[-1] == "earlier" else 4)
left = sorted(str(path.relative_to(where)) for path in where.rglob("*") if path.is_file())
print(json.dumps(statuses), json.dumps(found), len(left), sep="|")
"""


def outcome(tmp_path: Path, keep: int) -> tuple[list[int], list[str], int]:
    finished = subprocess.run(
        [*prepared_python("lentando.torch"), "-c", PROGRAM, str(tmp_path / "saved"), str(keep)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    statuses, found, files = finished.stdout.strip().split("|")
    return json.loads(statuses), json.loads(found), int(files)


def test_killed_while_it_replaces_a_checkpoint(tmp_path: Path) -> None:
    statuses, found, files = outcome(tmp_path, keep=0)
    assert len(statuses) >= 5
    assert set(statuses[:-1]) == {9}
    assert found[0] == "earlier"
    assert found[-1] == "later"
    assert files == 3  # what killed savers left behind is gone


def test_killed_while_it_adds_a_checkpoint_and_removes_the_oldest(tmp_path: Path) -> None:
    statuses, found, files = outcome(tmp_path, keep=1)
    assert len(statuses) >= 8
    assert found[0] == "earlier"
    assert found[-1] == "later"
    assert files == 3
