"""``tests/gpu/run.sh``, without a GPU: all of its parts begin, end and leave what they found."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import image_archives
import pytest

ROOT = Path(__file__).parents[1]
COMMAND = ["bash", str(ROOT / "tests/gpu/run.sh"), "--dry-run"]
PARTS = [
    "tests",
    "between rounds",
    "outer step over NCCL",
    "outer step through host memory",
    "training, local-sgd-slowmo",
]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=500
    )


@pytest.mark.long
def test_dry_run_of_everything_that_a_gpu_is_to_show(tmp_path: Path) -> None:
    image_archives.write_fashion_mnist(tmp_path, 64)
    output = tmp_path / "found"
    done = run("--output", str(output), "--data", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["dry_run"]
    assert {name: part["status"] for name, part in results["parts"].items()} == dict.fromkeys(PARTS, 0)
    assert results["tests"]["failed"] == 0
    assert results["tests"]["passed"] > 60
    figures = results["between rounds"]["between_rounds"]
    assert len(figures) == 6
    assert all(figure["added_percent"] > -100 for figure in figures)
    outer_step = results["outer step through host memory"]["outer_step"]
    assert outer_step["transport"] == "mpi"
    assert min(outer_step["seconds"]["to the host"]) > 0
    assert results["training, local-sgd-slowmo"]["ranks"] == 2
    tables = (output / "gpu.md").read_text()
    assert tables.count("DRY RUN ON A CPU: these figures mean nothing") == 3
    assert (output / "log.txt").read_text() == done.stdout


def test_what_cannot_begin_is_refused_at_once(tmp_path: Path) -> None:
    new = tmp_path / "new"
    for arguments, expected in (
        (["--output", str(tmp_path)], f"--output {tmp_path} exists: name a new folder"),
        (["--output", str(new), "--data", "nowhere"], "nowhere holds no fashion-mnist: make data, then --data data"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert expected in done.stderr
    assert not new.exists()


def test_part_that_takes_too_long_is_stopped_and_noted() -> None:
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "tests/gpu/run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    log = io.StringIO()
    ended = module.run(module.Part("a part", ["sleep", "60"], 0.5), log)
    assert ended["status"] is None
    assert ended["seconds"] < 30
    assert "a part: stopped after" in log.getvalue()
    assert module.run(module.Part("another", ["false"], 60), log)["status"] == 1
