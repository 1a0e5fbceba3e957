"""What the experiments on simulated workers share, with rows that are trained at once."""

import fcntl
import sys
from argparse import Namespace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

FOLDER = str(Path(__file__).parents[2] / "examples")
sys.path.insert(0, FOLDER)
try:
    import recipe_effect
finally:
    sys.path.remove(FOLDER)

COLUMNS = (recipe_effect.Column("loss", "loss", digits=1), recipe_effect.Column("hits", "hits", 100, 0, " %"))


def options(folder: Path, *rows: str) -> Namespace:
    return Namespace(output=folder, rows=list(rows), seeds=[0, 1], missing=False)


def test_complete_runs_are_kept_and_others_are_done_later(tmp_path: Path) -> None:
    done: list[tuple[str, int]] = []

    def train(row: str, seed: int) -> dict[str, Any]:
        done.append((row, seed))
        return {"loss": 1.0 + seed, "hits": None if row == "b" else 0.5}

    def interrupted(row: str, seed: int) -> dict[str, Any]:
        if (row, seed) == ("b", 1):
            raise KeyboardInterrupt
        return train(row, seed)

    with pytest.raises(KeyboardInterrupt):
        recipe_effect.run_missing(options(tmp_path, "a", "b"), {"lr": 1}, interrupted)
    assert done == [("a", 0), ("b", 0), ("a", 1)]
    recipe_effect.run_missing(options(tmp_path, "a", "b", "c"), {"lr": 1}, train)
    assert done[3:] == [("c", 0), ("b", 1), ("c", 1)]
    assert recipe_effect.table(tmp_path, {"a": "1.4", "b": "", "d": ""}, COLUMNS).splitlines() == [
        "| row | paper | loss | hits | seeds |",
        "|---|---|---|---|---|",
        "| `a` | 1.4 | 1.5 ± 0.7 | 50 % | 2 |",
        "| `b` |  | 1.5 ± 0.7 |  | 2 |",
    ]
    with pytest.raises(SystemExit, match=r"holds runs with other settings: \{'lr': 1\}, not \{'lr': 2\}"):
        recipe_effect.run_missing(options(tmp_path, "a"), {"lr": 2}, train)


def test_differences_are_those_of_runs_with_the_same_seed(tmp_path: Path) -> None:
    losses = {"a": {0: 1.0, 1: 2.0, 2: 9.0}, "b": {0: 1.5, 1: 2.7, 3: 0.0}}
    for row, by_seed in losses.items():
        options_of_row = Namespace(output=tmp_path, rows=[row], seeds=list(by_seed), missing=False)
        recipe_effect.run_missing(
            options_of_row, {}, lambda row, seed: {"loss": losses[row][seed], "hits": 0.5 if row == "a" else 0.25}
        )
    # Without a pair of runs there is no line: of -0.5 and -0.7 the mean is -0.6, the standard deviation 0.14.
    assert recipe_effect.differences(tmp_path, (("a", "b"), ("a", "c")), COLUMNS).splitlines() == [
        "",
        "| row | minus | loss | hits | seeds |",
        "|---|---|---|---|---|",
        "| `a` | `b` | -0.6 ± 0.1 | +25 points | 2 |",
    ]
    assert recipe_effect.differences(tmp_path, (("a", "c"),), COLUMNS) == ""


def test_a_cell_says_how_many_runs_have_the_figure() -> None:
    assert COLUMNS[0].cell([{"loss": 1.0}, {"loss": None}, {"loss": 2.0}]) == "1.5 ± 0.7 (2 of 3)"


def test_processes_that_begin_together_read_whole_settings(tmp_path: Path) -> None:
    assert recipe_effect.table(tmp_path, {"a": ""}, COLUMNS) == "No run has been completed yet."
    settings = {"lr": list(range(20_000))}  # long, so that writing takes a while
    recipe_effect.run_missing(options(tmp_path), settings, lambda row, seed: {})
    again = partial(recipe_effect.run_missing, options(tmp_path), settings, lambda row, seed: {})
    others = [get_context("fork").Process(target=lambda: [again() for _ in range(20)]) for _ in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]


def test_a_run_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    with recipe_effect.file_of(tmp_path, "a", 0).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recipe_effect.run_missing(options(tmp_path, "a"), {}, lambda row, seed: {"loss": seed})
    assert [run["seed"] for run in recipe_effect.runs_of(tmp_path, "a")] == [1]
