"""Scripts that were written for Horovod: how many lines change, and what is trained then."""

import difflib
import re
from pathlib import Path

import pytest
from case_selection import selected_cases
from launchers import HOROVOD_GLOO, OPEN_MPI, Launcher
from recipe_runs import imported

FOLDER = Path(__file__).parents[2] / "examples/migrating_from_horovod"


def changed_lines(before: str, after: str) -> list[tuple[str, str]]:
    """The lines that differ, before and after; fails if a line was added or taken away."""
    old, new = ((FOLDER / name).read_text().splitlines() for name in (before, after))
    assert len(old) == len(new)
    opcodes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    found = []
    for kind, start, end, other_start, other_end in opcodes:
        assert kind in ("equal", "replace")
        if kind == "replace":
            found += list(zip(old[start:end], new[other_start:other_end], strict=True))
    return found


@pytest.mark.parametrize(
    ("framework", "horovod", "package"),
    [("torch", "horovod.torch", "lentando.torch"), ("keras", "horovod.keras", "lentando.tensorflow")],
)
def test_import_line_is_all_that_changes(framework: str, horovod: str, package: str) -> None:
    imports = (f"import {horovod} as hvd", f"import {package} as hvd")
    assert changed_lines(f"horovod_{framework}.py", f"lentando_{framework}.py") == [imports]
    first, second = changed_lines(f"horovod_{framework}.py", f"slowmo_{framework}.py")
    assert first == imports
    assert second[0].startswith("optimizer = hvd.DistributedOptimizer(optimizer")
    assert second[1].startswith("optimizer = hvd.SlowMo(optimizer")


def accuracy(launcher: Launcher, script: str, *arguments: str) -> float:
    job = launcher.run(2, str(FOLDER / script), *arguments, timeout_seconds=120, prepared=imported(script))
    assert job.status == 0, job.output
    (found,) = re.findall(r"accuracy ([\d.]+) on 2 ranks", job.output)
    return float(found)


@pytest.mark.parametrize(
    "script",
    ["slowmo_torch.py", "slowmo_keras.py", *selected_cases([], ["lentando_torch.py", "lentando_keras.py"])],
)
def test_changed_scripts_train(script: str) -> None:
    """Not ``horovod_keras.py``: Horovod 0.28.1 cannot be built against this TensorFlow, and does not know Keras 3."""
    assert accuracy(OPEN_MPI, script) > 0.88


def test_horovod_and_lentando_train_the_same_weights(tmp_path: Path) -> None:
    """The original under the real Horovod, against the changed one over MPI and over Horovod's engine."""
    import torch

    HOROVOD_GLOO.need()
    weights = []
    for name, launcher, script in (
        ("horovod", HOROVOD_GLOO, "horovod_torch.py"),
        ("mpi", OPEN_MPI, "lentando_torch.py"),
        ("gloo", HOROVOD_GLOO, "lentando_torch.py"),
    ):
        assert accuracy(launcher, script, "--save", str(tmp_path / name)) > 0.88
        weights.append(torch.load(tmp_path / name))
    original, *ours = weights
    largest = {name: tensor.abs().max() for name, tensor in original.items()}
    for trained in ours:
        assert trained.keys() == original.keys()
        for name, tensor in original.items():
            # Rounding, at most: the last epoch in another order changes a weight by a sixth of the largest.
            assert (trained[name] - tensor).abs().max() <= 1e-4 * largest[name], name
