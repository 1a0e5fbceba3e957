"""The benchmark beside the peers: its jobs start and end, and its table says what they told."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def test_peers_take_turns_and_end_in_a_table_and_pictures(tmp_path: Path) -> None:
    done = run(
        "node", "--sizes", "64KB,1MB", "--repeats", "2", "--libraries", "Open MPI,Gloo", "--results", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "node.md").read_text()
    assert table.strip() in done.stdout
    for line in ("| float32 buffer | ", "| 64 KB ", "| 1 MB ", "2 ranks on one node. ", "4 ranks on one node. "):
        assert line in table
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "node_2_ranks.png",
        "node_4_ranks.png",
    ]


def test_peer_that_is_not_here_is_an_error_that_says_who_is() -> None:
    done = run("node", "--libraries", "Open MPI,BlueConnect")
    assert done.returncode == 2
    assert "not here: BlueConnect; here are Lentando, Open MPI" in done.stderr
