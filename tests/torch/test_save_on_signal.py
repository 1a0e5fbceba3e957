"""SIGTERM in PyTorch: all ranks save at the same step and end with a status of their own; resumed, nothing is lost."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import mpirun
from stopped_training import resumed_after_a_signal_equals_undisturbed, run

PROGRAM = """
import hashlib, os, signal, sys
from pathlib import Path
import torch
import lentando.torch as lt

lt.init()
torch.set_num_threads(1)
torch.manual_seed(lt.rank())
where, method, *options = sys.argv[1:]
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer = {
    "allreduce": lambda: lt.DistributedOptimizer(sgd, model=model),
    "slowmo": lambda: lt.SlowMo(sgd, model=model, period=4),
    "slowmo, long rounds": lambda: lt.SlowMo(sgd, model=model, period=20),
    "slowmo over osgp": lambda: lt.SlowMo(sgd, model=model, base=lt.OSGP(deterministic=True), period=4),
    "sgp": lambda: lt.DistributedOptimizer(sgd, model=model, base=lt.SGP()),
}[method]()
scheduler = torch.optim.lr_scheduler.StepLR(sgd, 5, 0.5)
manual = "check" in options
step, first = 0, 0
if Path(where).exists():
    extra = lt.load(where, optimizer)
    first = extra["next"]
    scheduler.load_state_dict(extra["scheduler"])
    if not manual:
        scheduler.step()  # it was saved before, at the end of the optimizer's step
stop = lt.save_on_signal(
    where, optimizer, lambda: {"next": step + 1, "scheduler": scheduler.state_dict()},
    every=3 if "every" in options else None, automatic=not manual,
)
mine = [int(at.split("@")[1]) for at in os.environ["STOP"].split() if at.startswith(f"{lt.rank()}@")]
for step in range(first, int(os.environ["STEPS"])):
    if step in mine:
        os.kill(os.getpid(), signal.SIGTERM)
    generator = torch.Generator().manual_seed(1000 * lt.rank() + step)
    optimizer.zero_grad()
    loss = model(torch.randn(6, 4, generator=generator)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    scheduler.step()
    stop.check()
digest = hashlib.sha256()
for tensor in model.state_dict().values():
    digest.update(tensor.numpy().tobytes())
print("END", lt.rank(), digest.hexdigest(), flush=True)
"""
METHODS = ["allreduce", "slowmo over osgp", "sgp"]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_signal_to_one_rank_saves_all_and_resuming_loses_nothing(program: Path, tmp_path: Path, method: str) -> None:
    stopped = resumed_after_a_signal_equals_undisturbed(program, tmp_path, method, stop="1@6")
    # Where the message goes that the ranks exchange next; gossip alone has one in every 16 steps.
    saved = {"allreduce": 7, "slowmo over osgp": 8, "sgp": 16}[method]
    assert f"rank 1 of 2 was told to stop: saved to {tmp_path}/saved after inner step {saved}," in stopped.output


def test_signals_to_several_ranks_at_different_steps_save_once(program: Path, tmp_path: Path) -> None:
    stopped = resumed_after_a_signal_equals_undisturbed(program, tmp_path, "slowmo", stop="0@5 1@7")
    assert "ranks 0 and 1 of 2 were told to stop" in stopped.output


@pytest.mark.parametrize(("options", "saved"), [(("check",), 20), (("every",), 9)])
def test_rounds_that_last_too_long_may_have_a_message_more(
    program: Path, tmp_path: Path, options: tuple[str, ...], saved: int
) -> None:
    stopped = resumed_after_a_signal_equals_undisturbed(program, tmp_path, "slowmo, long rounds", *options, stop="1@6")
    assert f"after inner step {saved}," in stopped.output


@pytest.mark.parametrize("method", ["slowmo", "allreduce"])
def test_inside_join_a_rank_that_has_run_out_saves_too(program: Path, tmp_path: Path, method: str) -> None:
    text = program.read_text()
    loop = text[text.index("for step in") : text.index("digest =")]
    block = "with lt.join(optimizer):\n" + "".join(f"    {line}\n" for line in loop.splitlines())
    few = "range(first, 5 if lt.rank() == 1 else"
    program.write_text(text.replace(loop, block.replace("range(first,", few, 1)))
    job = run(program, str(tmp_path / "saved"), method, stop="0@9")
    assert job.status == 85, job.output
    assert (tmp_path / "saved/checkpoint.json").exists()


def test_second_signal_ends_a_rank_at_once(program: Path, tmp_path: Path) -> None:
    text = program.read_text().replace("signal.SIGTERM)", "signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)")
    program.write_text(text)
    job = run(program, str(tmp_path / "saved"), "slowmo", stop="1@6")
    assert job.status == 128 + signal.SIGTERM, job.output
    assert not (tmp_path / "saved").exists()


def test_checkpoint_that_cannot_be_written_is_an_error_on_every_rank(program: Path, tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("a file where the folder should be")
    program.write_text(program.read_text().replace("if Path(where).exists()", "if False"))
    job = run(program, str(tmp_path / "saved"), "slowmo", stop="1@6")
    assert job.status not in (0, 85, None)
    assert job.output.count("CheckpointError: saving a checkpoint to") == 2, job.output


def test_ranks_that_ask_for_different_things_are_named(tmp_path: Path) -> None:
    program = """
import signal, torch
import lentando.torch as lt
lt.init()
model = torch.nn.Linear(2, 2)
optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
lt.save_on_signal("nowhere", optimizer, signals=[signal.SIGTERM, signal.SIGUSR1][: 1 + lt.rank()])
"""
    job = mpirun(2, "-c", program, timeout_seconds=60)
    assert job.status not in (0, None)
    text = (
        "rank 0: save_on_signal(SIGTERM; every=None, automatic=True); rank 1: save_on_signal(SIGTERM, SIGUSR1; every="
    )
    assert job.output.count(f"MismatchError: the ranks do not save on signals alike: {text}") == 2, job.output


def test_handlers_of_before_come_back(tmp_path: Path) -> None:
    program = f"""
import os, signal, threading, torch
import lentando.torch as lt
lt.init()
model = torch.nn.Linear(2, 2)
optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=1)
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append("mine"))
with lt.save_on_signal({str(tmp_path / "a")!r}, optimizer, signals=[signal.SIGUSR1]):
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)  # the second one is the program's own again
    assert heard == ["mine"]
os.kill(os.getpid(), signal.SIGUSR1)
assert heard == ["mine"] * 2
optimizer.step()  # saves no more
assert not os.path.exists({str(tmp_path / "a")!r})
def elsewhere():
    try:
        lt.save_on_signal("nowhere", optimizer)
    except lt.ConfigurationError as error:
        print(error)
thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
for options in ({{"every": 0}}, {{"every": True}}):
    try:
        lt.save_on_signal("nowhere", optimizer, **options)
    except lt.ConfigurationError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "in the main thread alone" in done.stdout
    assert done.stdout.count("every must be an integer >= 1") == 2
