"""The comparison of ways to train with one slow worker, of few steps."""

import sys
from math import inf
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import unequal  # noqa: E402


def test_every_worker_has_its_own_shard_of_the_digits() -> None:
    labels = torch.arange(10).repeat(20)
    shards = [unequal.shard(labels, "own", rank, 4) for rank in range(4)]
    assert sorted(torch.cat(shards).tolist()) == list(range(200))
    assert labels[shards[3]].unique().tolist() == [7, 8, 9]
    assert not set(labels[torch.cat(shards[:3])].tolist()) & {8, 9}
    assert [unequal.shard(labels, "own", rank, 3).tolist() for rank in range(3)] == [s.tolist() for s in shards[:3]]
    alike = [unequal.shard(labels, "alike", rank, 3) for rank in range(3)]
    assert sorted(torch.cat(alike).tolist()) == list(range(200))


def test_ways_are_tuned_and_compared_in_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "unequal.md"
    few = ["--seeds", "1", "--tuning-seeds", "1", "--learning-rates", "0.2", "1e-9", "--rounds", "2"]
    unequal.main(["--data", "own", *few, "--limit-seconds", "8", "--markdown", str(page)])
    text = page.read_text()
    assert capsys.readouterr().out.count("learning rate 0.2:") == len(unequal.ways(0.1))
    assert text.count("\n| ") == len(unequal.ways(0.1)) + 1
    assert "## Data: own" in text
    assert "rounds by seconds, normalized" in text


def test_ratios_are_of_medians() -> None:
    found = {
        unequal.EQUAL: unequal.Found(0.1, [8.0, 6.0, 7.0]),
        unequal.LEFT_OUT: unequal.Found(0.1, [inf, inf, 1.0]),
        "other": unequal.Found(0.2, [2.0, inf, 3.5]),
    }
    assert unequal.rows_of(found)[1:] == [
        [unequal.LEFT_OUT, "0.1", "never", "never, never, 1.0", "", ""],
        ["other", "0.2", "3.5", "2.0, never, 3.5", "2.00", "other never"],
    ]
