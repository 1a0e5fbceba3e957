"""One rank of a job that runs PyTorch's tests of c10d backends, one after the other.

    python worker.py BACKEND FOLDER

FOLDER holds ``tests.json``, the names of the tests. The rank appends one line of JSON for each test to a file of its
own there. It ends after a test that has not passed on all ranks: its groups may be in any state.
"""

import json
import os
import sys
import time
import traceback
import unittest
from datetime import timedelta
from pathlib import Path

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ["PMI_SIZE"])
OTHERS_SECONDS = 120.0


def main() -> None:
    backend, folder = sys.argv[1], Path(sys.argv[2])
    # The tests choose by these names what to run. For this process, "gloo" is the backend that is tested.
    os.environ.update(BACKEND="gloo", WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1", TEMP_DIR=str(folder))
    if backend == "lentando":
        replace_gloo()
    import torch
    from torch.testing._internal.distributed import distributed_test as suite

    class Tests(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
        pass

    if backend == "lentando":  # events are recorded by the backends of PyTorch's C++ part
        suite.PROFILING_SUPPORTED_BACKENDS = suite.SEND_RECV_PROFILING_SUPPORTED_BACKENDS = []
    torch.set_num_threads(1)
    os.environ["MASTER_PORT"] = "29500"  # only printed: groups find each other through a file
    names = json.loads((folder / "tests.json").read_text())
    for number, name in enumerate(names):
        outcome, text = run(Tests, suite, name, folder / f"store-{number}")
        with (folder / f"results-{RANK}").open("a") as results:
            results.write(json.dumps([name, outcome, text]) + "\n")
        if not all_passed(folder, number):
            os._exit(0)  # the other ranks may wait for this one
    sys.stdout.flush()


def replace_gloo() -> None:
    """Let torch.distributed create a group of backend lentando where it would create one of gloo."""
    from types import SimpleNamespace

    from torch.distributed import distributed_c10d

    import lentando.c10d
    from lentando.c10d import members

    class InsteadOfGloo(lentando.c10d.LentandoProcessGroup):
        def __init__(self, store, rank, size, timeout):  # type: ignore[no-untyped-def]
            super().__init__(members.open_members(store, rank, size, "tested", timeout), timeout)
            self.options = SimpleNamespace()

    distributed_c10d.ProcessGroupGloo = InsteadOfGloo


def run(tests, suite, name: str, store: Path) -> tuple[str, str]:  # type: ignore[no-untyped-def]
    from torch import distributed as dist
    from torch.testing._internal import common_utils

    test = tests(name)
    test.rank, test.file_name = RANK, str(store)
    try:
        dist.init_process_group(
            init_method=f"file://{store}",
            backend="gloo",
            world_size=SIZE,
            rank=RANK,
            timeout=timedelta(seconds=suite.CUSTOM_PG_TIMEOUT.get(name, suite.default_pg_timeout)),
        )
        common_utils.set_rng_seed()
        if RANK == 0:
            suite.Barrier.init()
        dist.barrier()
        suite.Barrier.barrier_id = 0
        getattr(test, name)()
        dist.barrier() if dist.is_initialized() else None
    except unittest.SkipTest as reason:
        outcome = "skipped", str(reason)
    except SystemExit as end:  # how the suite's decorators skip a test
        code = end.code
        outcome = ("passed", "") if code == 0 else ("skipped", skip_reason(code))
    except BaseException:  # noqa: BLE001 - reported
        return "failed", traceback.format_exc()
    else:
        outcome = "passed", ""
    if dist.is_initialized():
        dist.destroy_process_group()
    return outcome


def skip_reason(code: object) -> str:
    from torch.testing._internal.common_distributed import TEST_SKIPS

    return next((skip.message for skip in TEST_SKIPS.values() if skip.exit_code == code), f"exit code {code}")


def all_passed(folder: Path, number: int) -> bool:
    """Wait for all ranks to report a test; return whether none has failed."""
    until = time.monotonic() + OTHERS_SECONDS
    while time.monotonic() < until:
        paths = [folder / f"results-{rank}" for rank in range(SIZE)]
        reported = [path.read_text().splitlines() if path.exists() else [] for path in paths]
        lines = [json.loads(each[number]) for each in reported if len(each) > number]
        if any(outcome == "failed" for _, outcome, _ in lines):
            return False
        if len(lines) == SIZE:
            return True
        time.sleep(0.005)
    return False


if __name__ == "__main__":
    main()
