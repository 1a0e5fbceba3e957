"""The life of a job, seen from one process that was started alone. ``test_jobs.py`` has those of several ranks."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
from matching_nccl import MatchingBinding, MatchingNCCL

from lentando.comm import world
from lentando.comm.errors import ConfigurationError, LaunchError, NotInitializedError
from lentando.comm.process_end import process_end
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transports.nccl import NCCLTransport
from lentando.comm.transports.single import SingleTransport

VARIABLES = (
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "SLURM_STEP_NUM_TASKS",
    "HOROVOD_RANK", "HOROVOD_SIZE", "RANK", "WORLD_SIZE", "LENTANDO_TRANSPORT", "LENTANDO_LOG_LEVEL",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@pytest.fixture(autouse=True)
def started_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher, no MPI, no job, and none left behind; the hooks for the end of a process stay out of this one."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)  # importing it is an ImportError
    monkeypatch.delattr("mpi4py.MPI", raising=False)  # which a test before this one may have imported
    monkeypatch.setattr(world, "_process", world._Program())
    monkeypatch.setattr(process_end, "is_installed", True)
    logger = logging.getLogger("lentando")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_program_that_was_started_alone_becomes_a_world_of_one_without_mpi() -> None:
    world.init()
    assert isinstance(world.transport(), SingleTransport)
    assert (world.rank(), world.size(), world.local_rank(), world.local_size()) == (0, 1, 0, 1)


@pytest.mark.parametrize("use", [world.rank, world.size, world.local_rank, world.local_size, world.transport])
def test_use_before_init_says_what_to_do(use: object) -> None:
    assert not world.is_initialized()
    with pytest.raises(NotInitializedError, match=r"call init\(\) first, once, on every rank") as error:
        use()  # type: ignore[operator]
    assert isinstance(error.value, ValueError)  # as Horovod's, which programs catch


def test_use_after_shutdown_says_what_to_do() -> None:
    world.init()
    world.shutdown()
    assert not world.is_initialized()
    with pytest.raises(NotInitializedError, match=r"call init\(\) first"):
        world.rank()


def test_init_with_a_list_of_ranks_says_what_to_do_in_its_place() -> None:
    with pytest.raises(ConfigurationError, match=r"as comm, got \[0, 1\]. .* process_set=add_process_set\(ranks\)"):
        world.init([0, 1])  # type: ignore[arg-type]
    assert not world.is_initialized()


def test_second_init_changes_nothing() -> None:
    world.init()
    transport = world.transport()
    world.init()
    assert world.transport() is transport


def test_second_shutdown_changes_nothing() -> None:
    world.init()
    world.shutdown()
    world.shutdown()
    assert not world.is_initialized()


def test_job_can_be_joined_again_after_it_was_left() -> None:
    world.init()
    world.shutdown()
    world.init()
    assert world.size() == 1


def test_init_takes_any_transport() -> None:
    (transport,) = run_ranks(1, lambda transport: transport)
    world.init(transport)
    assert isinstance(world.transport(), ThreadTransport)


@pytest.mark.parametrize("choice", ["tcp", "", "MPI"])
def test_transport_that_does_not_exist_is_refused_with_those_that_do(
    monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    monkeypatch.setenv("LENTANDO_TRANSPORT", choice)
    legal = "horovod, mpi, nccl, single"
    with pytest.raises(ConfigurationError, match=f"LENTANDO_TRANSPORT='{choice}': expected one of {legal}"):
        world.init()
    assert not world.is_initialized()


def test_single_can_be_forced_in_a_job_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("LENTANDO_TRANSPORT", "single")
    world.init()
    assert world.size() == 1


@pytest.mark.parametrize("size", ["1", "4"])
def test_mpi_that_cannot_be_loaded_is_an_error_under_a_launcher_of_mpi(
    monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", size)
    with pytest.raises(LaunchError, match="started this process, but MPI cannot be loaded .* Install the MPI"):
        world.init()


def test_forced_mpi_that_cannot_be_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENTANDO_TRANSPORT", "mpi")
    with pytest.raises(LaunchError, match="LENTANDO_TRANSPORT=mpi, but MPI cannot be loaded"):
        world.init()


def test_transport_torch_without_a_meeting_point_is_refused_before_pytorch_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LENTANDO_TRANSPORT", "torch")
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it is an ImportError
    with pytest.raises(LaunchError, match=r"lacks RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT\."):
        world.init()


def test_forced_nccl_goes_over_the_transport_that_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENTANDO_TRANSPORT", "nccl")
    monkeypatch.setattr(
        "lentando.comm.transports.nccl.NCCLBinding", lambda: MatchingBinding(MatchingNCCL(1, 1.0, 0.0), 0)
    )
    world.init()
    assert isinstance(world.transport(), NCCLTransport)
    assert (world.size(), world.transport().traffic.messages) == (1, 0)
    world.shutdown()


@pytest.mark.parametrize("missing", ["cupy", "nccl"])
def test_forced_nccl_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("LENTANDO_TRANSPORT", "nccl")
    monkeypatch.setattr(
        "lentando.comm.transports.nccl_binding.find_spec", lambda name: None if name == missing else object()
    )
    package = {"cupy": "CuPy", "nccl": "nccl4py"}[missing]
    with pytest.raises(
        LaunchError,
        match=rf"NCCL cannot be used: rank 0: {package} is not installed \(pip install 'lentando\[gpu\]' installs both",
    ):
        world.init()
    assert not world.is_initialized()


def test_forced_nccl_whose_packages_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENTANDO_TRANSPORT", "nccl")
    monkeypatch.setattr("lentando.comm.transports.nccl_binding.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it is an ImportError
    with pytest.raises(LaunchError, match=r"CuPy or nccl4py cannot be loaded \(import of cupy halted"):
        world.init()


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "1"}, {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"}])
def test_one_process_needs_no_mpi_whichever_launcher_started_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    world.init()
    assert isinstance(world.transport(), SingleTransport)


@pytest.mark.parametrize("level", ["loud", "", "10"])
def test_log_level_that_does_not_exist_is_refused_before_the_job_is_joined(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.setenv("LENTANDO_LOG_LEVEL", level)
    with pytest.raises(
        ConfigurationError, match=f"LENTANDO_LOG_LEVEL='{level}': expected debug, info, warning or error"
    ):
        world.init()
    assert not world.is_initialized()


def test_log_level_info_reports_the_place_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LENTANDO_LOG_LEVEL", "info")
    world.init()
    assert capsys.readouterr().err == "[lentando rank 0] INFO rank 0 of 1 over single\n"
    world.shutdown()
    world.init()
    assert capsys.readouterr().err.count("rank 0 of 1 over single") == 1


@pytest.mark.parametrize("level", [None, "warning"])
def test_nothing_is_written_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str | None
) -> None:
    if level:
        monkeypatch.setenv("LENTANDO_LOG_LEVEL", level)
    world.init()
    assert capsys.readouterr().err == ""


def test_program_that_fails_alone_ends_like_any_other() -> None:
    program = "from lentando.comm import world; world.init(); raise ValueError('boom')"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert finished.stderr.endswith("ValueError: boom\n")
