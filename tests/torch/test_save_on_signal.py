"""SIGTERM in PyTorch: all ranks save at the same step and end with a status of their own; resumed, nothing is lost."""

import signal
import subprocess
from pathlib import Path

import pytest
from case_selection import selected_cases
from launching import mpirun
from prepared_python import prepared_python
from stopped_training import Case, Outcome, assert_nothing_is_lost, outcomes, run

PROGRAM = """
import hashlib, os, signal, sys
from contextlib import nullcontext
from pathlib import Path
import torch
import lentando.torch as lt

def train(where, method, *options):
    torch.manual_seed(lt.rank())
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = {
        "allreduce": lambda: lt.DistributedOptimizer(sgd, model=model),
        "slowmo": lambda: lt.SlowMo(sgd, model=model, period=4),
        "slowmo, long rounds": lambda: lt.SlowMo(sgd, model=model, period=20),
        "slowmo with delay": lambda: lt.SlowMo(sgd, model=model, period=4, delay=3),
        "slowmo over osgp": lambda: lt.SlowMo(sgd, model=model, base=lt.OSGP(deterministic=True), period=4),
        "sgp": lambda: lt.DistributedOptimizer(sgd, model=model, base=lt.SGP()),
    }[method]()
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, 5, 0.5)
    manual = "check" in options
    step, first, last = 0, 0, int(os.environ["STEPS"])
    if Path(where).is_dir():
        extra = lt.load(where, optimizer)
        first = extra["next"]
        scheduler.load_state_dict(extra["scheduler"])
        if not manual:
            scheduler.step()  # it was saved before, at the end of the optimizer's step
    mine = [int(at.split("@")[1]) for at in os.environ["STOP"].split() if at.startswith(f"{lt.rank()}@")]
    joined = lt.join(optimizer) if "join" in options else nullcontext()
    if "join" in options and lt.rank() == 1:
        last = 5
    stop = lt.save_on_signal(
        where, optimizer, lambda: {"next": step + 1, "scheduler": scheduler.state_dict()},
        every=3 if "every" in options else None, automatic=not manual,
    )
    with joined:
        for step in range(first, last):
            if step in mine:
                for _ in range(2 if "twice" in options else 1):
                    os.kill(os.getpid(), signal.SIGTERM)
            generator = torch.Generator().manual_seed(1000 * lt.rank() + step)
            optimizer.zero_grad()
            loss = model(torch.randn(6, 4, generator=generator)).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
            scheduler.step()
            stop.check()
    stop.close()
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    sys.stdout.write(f"END {lt.rank()} {digest.hexdigest()} {where}:{':'.join((method, *options))}\\n")
    sys.stdout.flush()

lt.init()
torch.set_num_threads(1)
for training in sys.argv[1:]:
    train(*training.split(":"))
"""
# Where the message goes that the ranks exchange next; gossip alone has one in every 16 steps.
METHODS = [
    Case("slowmo with delay", 8),
    Case("sgp", 16),
    *selected_cases([], [Case("allreduce", 7), Case("slowmo over osgp", 8)]),
]
SEVERAL = Case("slowmo", 8, stop="0@5 1@7")
LONG_ROUNDS = [Case("slowmo, long rounds:every", 9), *selected_cases([], [Case("slowmo, long rounds:check", 20)])]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def found(program: Path) -> dict[Case, Outcome]:
    cases = [*METHODS, SEVERAL, *LONG_ROUNDS]
    return dict(zip(cases, outcomes(program, program.parent, cases, "lentando.torch"), strict=True))


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.what)
def test_signal_to_one_rank_saves_all_and_resuming_loses_nothing(found: dict[Case, Outcome], case: Case) -> None:
    assert_nothing_is_lost(case, found[case])
    assert "rank 1 of 2 received a signal to stop: saved to " in found[case].stopped.output


def test_signals_to_several_ranks_at_different_steps_save_once(found: dict[Case, Outcome]) -> None:
    assert_nothing_is_lost(SEVERAL, found[SEVERAL])
    assert "ranks 0 and 1 of 2 received a signal to stop" in found[SEVERAL].stopped.output


@pytest.mark.parametrize("case", LONG_ROUNDS, ids=lambda case: case.what)
def test_rounds_that_last_too_long_may_have_a_message_more(found: dict[Case, Outcome], case: Case) -> None:
    assert_nothing_is_lost(case, found[case])


@pytest.mark.parametrize("method", selected_cases(["slowmo"], ["slowmo", "allreduce"]))
def test_inside_join_a_rank_that_has_run_out_saves_too(program: Path, tmp_path: Path, method: str) -> None:
    job = run(program, f"{tmp_path / 'saved'}:{method}:join", stop="0@9")
    assert job.status == 85, job.output
    assert (tmp_path / "saved/checkpoint.json").exists()


def test_second_signal_ends_a_rank_at_once(program: Path, tmp_path: Path) -> None:
    job = run(program, f"{tmp_path / 'saved'}:slowmo:twice", stop="1@6")
    assert job.status == 128 + signal.SIGTERM, job.output
    assert not (tmp_path / "saved").exists()


def test_checkpoint_that_cannot_be_written_is_an_error_on_every_rank(program: Path, tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("a file where the folder should be")
    job = run(program, f"{tmp_path / 'saved'}:slowmo", stop="1@6", prepared="lentando.torch")
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
    job = mpirun(2, "-c", program, timeout_seconds=120, prepared="lentando.torch")
    assert job.status not in (0, None)
    text = (
        "rank 0: save_on_signal(SIGTERM; every=None, automatic=True); rank 1: save_on_signal(SIGTERM, SIGUSR1; every="
    )
    assert job.output.count(f"MismatchError: the ranks call save_on_signal with different arguments: {text}") == 2, (
        job.output
    )


def test_previous_handlers_come_back(tmp_path: Path) -> None:
    program = f"""
import os, signal, threading, torch
import lentando.torch as lt
lt.init()
model = torch.nn.Linear(2, 2)
optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=1)
received = []
signal.signal(signal.SIGUSR1, lambda *_: received.append("mine"))
with lt.save_on_signal({str(tmp_path / "a")!r}, optimizer, signals=[signal.SIGUSR1]):
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)  # the second one is the program's own again
    assert received == ["mine"]
os.kill(os.getpid(), signal.SIGUSR1)
assert received == ["mine"] * 2
optimizer.step()  # saves no more
assert not os.path.exists({str(tmp_path / "a")!r})
try:
    with lt.save_on_signal({str(tmp_path / "a")!r}, optimizer, signals=[signal.SIGUSR1]):
        os.kill(os.getpid(), signal.SIGUSR1)
        optimizer.step()
except SystemExit as error:
    assert error.code == 85 and os.path.exists({str(tmp_path / "a")!r})
    os.kill(os.getpid(), signal.SIGUSR1)  # comes while the job is leaving
    assert received == ["mine"] * 2
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
    python = prepared_python("lentando.torch")
    done = subprocess.run([*python, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "only in the main thread" in done.stdout
    assert done.stdout.count("every must be an integer >= 1") == 2
