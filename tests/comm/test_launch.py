"""Who started this process: reported from the variables that real launchers set."""

import pytest

from lentando.comm.errors import LaunchError
from lentando.comm.launch import Launch, advice_on_library, check_library, check_world, detect_launch

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_UNIVERSE_SIZE": "4",
    "PMIX_RANK": "2",
    "PMIX_NAMESPACE": "prterun-host-5368@1",
}
OPEN_MPI_OF_ONE = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "3", "PMI_FD": "7", "MPI_LOCALNRANKS": "3"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2", "PMI_RANK": "0", "PMI_SIZE": "2"}
SLURM_BATCH = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
SLURM_STEP = {**SLURM_BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}
HOROVOD_GLOO = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_CONTROLLER": "gloo"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
}
OTHER = {"HOME": "/home/me", "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("environment", "launcher", "size", "mpi"),
    [
        (OPEN_MPI, "mpirun (Open MPI)", 4, True),
        (HYDRA, "mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2", 3, True),
        (MVAPICH, "mpiexec (MVAPICH2)", 2, True),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "prte@1"}, "a PMIx launcher (prun, or srun --mpi=pmix)", None, True),
        (SLURM_STEP, "srun", 8, True),
        ({**SLURM_STEP, "PMI_RANK": "5", "PMI_SIZE": "8"}, "mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2", 8, True),
        ({**SLURM_BATCH, **OPEN_MPI}, "mpirun (Open MPI)", 4, True),
        ({**SLURM_STEP, **OPEN_MPI}, "mpirun (Open MPI)", 4, True),
        (HOROVOD_GLOO, "horovodrun", 2, False),
        ({"HOROVOD_CONTROLLER": "mpi", **OPEN_MPI}, "mpirun (Open MPI)", 4, True),
        ({**HOROVOD_GLOO, **OPEN_MPI_OF_ONE}, "horovodrun", 2, False),
        ({**OPEN_MPI, "PMI_RANK": "0", "PMI_SIZE": "1"}, "mpirun (Open MPI)", 4, True),
        (OPEN_MPI_OF_ONE, "mpirun (Open MPI)", 1, True),
        ({**HOROVOD_GLOO, "PMI_RANK": "1", "PMI_SIZE": "2"}, "mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2", 2, True),
        (TORCHRUN, "torchrun", 4, False),
        ({**OPEN_MPI, **TORCHRUN}, "torchrun", 4, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "a launcher that sets RANK and WORLD_SIZE", 2, False),
    ],
    ids=[
        "Open MPI", "Hydra", "MVAPICH2", "PMIx", "srun", "srun --mpi=pmi2", "mpirun in a Slurm batch script",
        "mpirun in a Slurm step", "horovodrun --gloo", "horovodrun --mpi", "horovodrun --gloo in a world of one",
        "mpirun in a world of one", "world of one", "Horovod in Hydra", "torchrun", "torchrun in mpirun",
        "RANK and WORLD_SIZE",
    ],
)  # fmt: skip
def test_launcher_is_reported_by_its_variables(
    environment: dict[str, str], launcher: str, size: int, mpi: bool
) -> None:
    found = detect_launch({**OTHER, **environment})
    assert found is not None
    assert (found.launcher, found.size, found.mpi) == (launcher, size, mpi)


@pytest.mark.parametrize(
    "environment",
    [{}, SLURM_BATCH, {"RANK": "3"}, {"WORLD_SIZE": "4"}],
    ids=["nothing", "batch script", "RANK", "WORLD_SIZE"],
)
def test_process_without_a_launcher_was_started_alone(environment: dict[str, str]) -> None:
    assert detect_launch({**OTHER, **environment}) is None


@pytest.mark.parametrize(
    ("environment", "present", "missing"),
    [
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK"),
        ({"PMI_RANK": "0"}, "PMI_RANK=0", "PMI_SIZE"),
        ({"HOROVOD_SIZE": "2"}, "HOROVOD_SIZE=2", "HOROVOD_RANK"),
    ],
)
def test_half_of_a_promise_is_an_error_that_names_both_variables(
    environment: dict[str, str], present: str, missing: str
) -> None:
    with pytest.raises(LaunchError, match=f"set {present} but not {missing}: .* or unset"):
        detect_launch(environment)


@pytest.mark.parametrize(
    ("environment", "first", "second"),
    [
        ({**OPEN_MPI, **HYDRA}, "mpirun (Open MPI) says rank 2 of 4 (OMPI_COMM_WORLD_RANK=2, OMPI_COMM_WORLD_SIZE=4)",
         "mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2 says rank 1 of 3 (PMI_RANK=1, PMI_SIZE=3)"),
        ({**OPEN_MPI, **HOROVOD_GLOO}, "mpirun (Open MPI) says rank 2 of 4",
         "horovodrun says rank 1 of 2 (HOROVOD_RANK=1, HOROVOD_SIZE=2)"),
        ({**OPEN_MPI, "PMI_RANK": "0", "PMI_SIZE": "4"}, "mpirun (Open MPI) says rank 2 of 4",
         "mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2 says rank 0 of 4"),
    ],
    ids=["two MPIs", "MPI and Horovod", "ranks"],
)  # fmt: skip
def test_launchers_that_disagree_are_an_error_that_names_both(
    environment: dict[str, str], first: str, second: str
) -> None:
    with pytest.raises(LaunchError) as error:
        detect_launch(environment)
    assert f"two launchers started this process and disagree: {first}" in str(error.value)
    assert f" but {second}" in str(error.value)
    assert "Start through one of them only" in str(error.value)


@pytest.mark.parametrize("size", ["", "many", "0", "-4", "4.0", "0x4"])
def test_number_of_ranks_that_is_none_is_an_error(size: str) -> None:
    with pytest.raises(LaunchError, match=f"set PMI_SIZE='{size}': expected a number of ranks >= 1"):
        detect_launch({"PMI_RANK": "0", "PMI_SIZE": size})


def test_environment_of_the_process_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in OPEN_MPI.items():
        monkeypatch.setenv(variable, value)
    assert detect_launch() == Launch("mpirun (Open MPI)", "OMPI_COMM_WORLD_SIZE", 4, mpi=True)


@pytest.mark.parametrize(
    ("launch", "mpi_size"),
    [
        (None, 1),
        (None, 4),
        (Launch("mpirun", "OMPI_COMM_WORLD_SIZE", 4, mpi=True), 4),
        (Launch("prun", "PMIX_RANK", None, mpi=True), 3),
    ],
)
def test_world_that_was_promised_is_accepted(launch: Launch | None, mpi_size: int) -> None:
    check_world(launch, mpi_size, "Open MPI v5.0.11")


@pytest.mark.parametrize(
    ("launch", "remedy"),
    [
        (Launch("mpiexec (MPICH)", "PMI_SIZE", 4, mpi=True), "start with the mpirun that came with it"),
        (Launch("horovodrun", "HOROVOD_SIZE", 4, mpi=False), "This launcher starts no MPI. Start with mpirun"),
    ],
)
def test_broken_promise_names_launcher_library_both_numbers_and_the_remedy(launch: Launch, remedy: str) -> None:
    with pytest.raises(LaunchError) as error:
        check_world(launch, 1, "Open MPI v5.0.11")
    message = str(error.value)
    assert f"{launch.launcher} promises 4 ranks ({launch.variable}=4), but MPI sees 1 (Open MPI v5.0.11)" in message
    assert "that would train 4 separate models" in message
    assert remedy in message


@pytest.mark.parametrize(
    ("environment", "stated"),
    [
        ({}, ""),
        ({"MPI4PY_LIBMPI": ""}, ""),
        ({"MPI4PY_LIBMPI": "/a/libmpi.so"}, "by MPI4PY_LIBMPI=/a/libmpi.so: unset this"),
        ({"MPI4PY_MPIABI": "mpich"}, "by MPI4PY_MPIABI=mpich: unset this"),
        ({"MPI4PY_MPIABI": "mpich", "MPI4PY_LIBMPI": "x"}, "by MPI4PY_LIBMPI=x and MPI4PY_MPIABI=mpich: unset this"),
    ],
)
def test_variables_that_choose_the_library_are_named(environment: dict[str, str], stated: str) -> None:
    advice = advice_on_library(environment)
    assert stated in advice if stated else not advice


def test_another_library_that_a_variable_has_chosen_is_blamed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPI4PY_LIBMPI", "/opt/mpich/libmpi.so")
    launch = detect_launch(OPEN_MPI)
    for refuse in (lambda: check_library(launch, "MPICH Version: 5.0"), lambda: check_world(launch, 1, "MPICH 5.0")):
        with pytest.raises(LaunchError, match="by MPI4PY_LIBMPI=/opt/mpich/libmpi.so: unset this, or name the MPI"):
            refuse()
