"""``make horovod-tests`` on a small folder of tests: what it says of tests that pass, differ, fail, hang and die."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from prepared_python import prepared_python

ROOT = Path(__file__).parents[1]
TESTS = """
import os, time, unittest
import horovod.torch as hvd
from horovod.torch.mpi_ops import no_such_function, synchronize
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))

class TorchTests(unittest.TestCase):
    def test_a_both_pass(self): assert hvd.Average is not None
    def test_b_both_skip(self): self.skipTest("for a reason")
    def test_c_one_fails(self): assert rank == 0, "an explanation"
    def test_d_passes_after_a_failure(self): pass
    def test_e_one_hangs(self):
        if rank == 1: time.sleep(1000)
    def test_f_unknown_name(self): hvd.no_such_name
    def test_g_unknown_function(self): no_such_function()
    def test_h_one_dies(self):
        if rank == 1: os._exit(3)
        time.sleep(0.5)
    def test_i_passes_after_a_death(self): pass
"""
EXPECTED = {
    "test_b_both_skip": ("skipped", "for a reason"),
    "test_c_one_fails": ("failed", "rank 0: passed; rank 1: AssertionError: an explanation"),
    "test_e_one_hangs": ("hung", "rank 1: did not end, in test_e_one_hangs"),
    "test_f_unknown_name": ("failed", "has no attribute 'no_such_name'"),
    "test_g_unknown_function": ("failed", "has no attribute 'no_such_function'"),
    "test_h_one_dies": ("hung", "did not end"),
}


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "tests/horovod_tests"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)


@pytest.mark.ranks
def test_each_outcome_is_reported_with_its_reason_and_the_rest_still_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    clone = tmp_path / "clone"
    folder = clone / "test/parallel"
    folder.mkdir(parents=True)
    folder.joinpath("test_torch.py").write_text(TESTS)
    before = sorted(clone.rglob("*"))
    found = tmp_path / "results.json"
    ranks = shlex.join(prepared_python("lentando.torch"))
    done = run(clone, "--files", "test_torch.py", "--seconds", "5", "--json", found, "--python", ranks)
    assert found.exists(), done.stdout + done.stderr
    record = json.loads(found.read_text())
    results = {result["test"]: result for result in record["results"]}
    assert len(results) == TESTS.count("def test_"), done.stdout
    for test, result in results.items():
        outcome, reason = EXPECTED.get(test, ("passed", ""))
        assert result["outcome"] == outcome, result
        assert reason in result["reason"], result
    assert record["versions"]["lentando"]
    assert sorted(clone.rglob("*")) == before, "the clone was changed"
    assert done.returncode == 1  # the page does not list these
    assert "test_c_one_fails does not pass, and horovod.md does not list it" in done.stdout


def test_folder_that_is_no_clone_is_an_error_that_says_where_to_get_one(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "expected a clone of Horovod's repository" in done.stderr
    assert "git clone" in done.stderr


def test_make_without_a_clone_says_where_to_get_one() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HOROVOD"}
    command = ["make", "--no-print-directory", "-C", str(ROOT), "-o", ".venv/.ready", "horovod-tests"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "git clone --branch v0.28.1" in done.stderr
