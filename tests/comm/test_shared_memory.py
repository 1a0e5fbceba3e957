"""Memory that other processes of the node can reach."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lentando.comm import shared_memory
from lentando.comm.dtypes import bfloat16
from lentando.comm.shared_memory import export_handle, import_handle, shared_zeros

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no anonymous files")

FLOAT = np.dtype(np.float32)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16, np.int8])
def test_it_is_zeroed_and_writable(dtype: type) -> None:
    array = shared_zeros(1003, np.dtype(dtype))
    assert array.dtype == dtype
    assert not array.any()
    array[7] = 3
    assert array[7] == 3


def test_another_process_reads_what_is_written_before_and_after_it_opened_and_writes() -> None:
    array = shared_zeros(10, FLOAT)
    array[:] = range(10)
    program = (
        "import json, sys\nimport numpy as np\nfrom lentando.comm.shared_memory import import_handle\n"
        "theirs = import_handle(json.loads(sys.argv[1]), 6, np.dtype(np.float32))\n"
        "print(theirs.tolist(), flush=True)\ninput()\nprint(theirs.tolist())\ntheirs[-1] = 7"
    )
    command = [sys.executable, "-c", program, json.dumps(export_handle(array[4:]))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "[4.0, 5.0, 6.0, 7.0, 8.0, 9.0]\n"
        array[4] = -1
        output, _ = process.communicate("\n", timeout=120)
    assert output == "[-1.0, 5.0, 6.0, 7.0, 8.0, 9.0]\n"
    assert array[9] == 7


@pytest.mark.slow
def test_nothing_is_left_when_the_last_view_is_gone() -> None:
    gc.collect()
    before = descriptors()
    view = shared_zeros(1000, FLOAT)[10:20]
    assert descriptors() > before
    opened = import_handle(export_handle(view) or [], 10, FLOAT)
    assert opened is not None
    del view
    gc.collect()
    assert not opened.any()  # the memory lives on while a process maps it
    del opened
    gc.collect()
    assert descriptors() == before


def test_ordinary_memory_cannot_be_offered() -> None:
    assert export_handle(np.zeros(3)) is None
    assert export_handle(shared_zeros(0, FLOAT)) is None


def test_file_of_another_process_under_the_same_numbers_is_refused() -> None:
    array = shared_zeros(4, FLOAT)
    found = export_handle(array)
    assert found is not None
    pid, descriptor, device, inode, start = found
    assert import_handle([pid, descriptor, device, inode + 1, start], 4, FLOAT) is None
    assert import_handle([pid, 10**6, device, inode, start], 4, FLOAT) is None
    assert import_handle([2**22 + 1, descriptor, device, inode, start], 4, FLOAT) is None  # no such process


def test_system_that_forbids_it_gets_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> int:
        raise PermissionError(name)

    monkeypatch.setattr(shared_memory.os, "memfd_create", forbidden)
    array = shared_zeros(5, FLOAT)
    assert array.tolist() == [0] * 5
    assert export_handle(array) is None


@pytest.mark.parametrize("limit", ["RLIMIT_FSIZE", "RLIMIT_NOFILE"])
def test_limit_of_the_system_leaves_ordinary_memory(limit: str) -> None:
    """``ulimit -f`` and ``ulimit -n``: nothing is left open, and no other process can reach the array."""
    program = (
        "import os, resource, sys\nimport numpy as np\n"
        "from lentando.comm.shared_memory import export_handle, shared_zeros\n"
        "before = sorted(os.listdir('/proc/self/fd'))\n"
        "value = len(before) - 1 if sys.argv[1] == 'RLIMIT_NOFILE' else 4096\n"
        "kind = getattr(resource, sys.argv[1])\nresource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))\n"
        "array = shared_zeros(10_000, np.dtype(np.float32))\narray[:] = 1\n"
        "resource.setrlimit(kind, (resource.getrlimit(kind)[1],) * 2)\n"
        "assert export_handle(array) is None\nassert sorted(os.listdir('/proc/self/fd')) == before\n"
    )
    subprocess.run([sys.executable, "-c", program, limit], check=True, timeout=120)
