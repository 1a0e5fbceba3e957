"""Hosts that ``benchmarks/cluster`` makes on this machine, each with a network namespace of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLUSTER = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "cluster")]
TWO_HOSTS = [*CLUSTER, "run", "--hosts", "2", "--"]
"""What stands before a command that runs on two hosts."""


def need_hosts() -> None:
    """Skip the test where no hosts can be made."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    probe = subprocess.run([*TWO_HOSTS, "true"], capture_output=True, text=True, timeout=120, check=False)
    if probe.returncode:
        pytest.skip(f"this machine does not let root make network namespaces: {probe.stderr.strip()}")
