"""Scripts in the structure of Horovod's examples: one line changes, and they train under Horovod and under Lentando."""

import re
from pathlib import Path

import pytest
from case_selection import selected_cases
from launchers import HOROVOD_GLOO, OPEN_MPI, Launcher
from recipe_runs import imported

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/migrating_from_horovod"
IMPORT = re.compile(r"^import horovod\.(.*) as hvd$", re.MULTILINE)
SCRIPTS = {
    "pytorch_mnist.py": [],
    "pytorch_synthetic_benchmark.py": [],
    "pytorch_imagenet_resnet50.py": ["--checkpoint-format", "{folder}/checkpoint-{{epoch}}"],
    "tensorflow2_synthetic_benchmark.py": [],
    "tensorflow2_keras_synthetic_benchmark.py": [],
    "tensorflow2_keras_mnist.py": [],
    "keras_mnist_advanced.py": [],
}
"""Their names, which are those of Horovod's examples, and arguments."""
TRAINED = selected_cases(
    ["pytorch_imagenet_resnet50.py", "keras_mnist_advanced.py"],
    list(SCRIPTS),
)
LEARNED = 0.7
"""Accuracy of those that learn; a guess has 0.1."""


def changed(script: str) -> tuple[str, str, str]:
    """The program with the import of Lentando, and the line before and after."""
    program = FOLDER.joinpath(script).read_text()
    (module,) = IMPORT.findall(program)
    before, after = f"import horovod.{module} as hvd", f"import lentando.{module} as hvd"
    return program.replace(before, after), before, after


def check(launcher: Launcher, script: str, program: Path, folder: Path) -> None:
    """The script prints at its end what it reached, on two ranks."""
    given = [argument.format(folder=folder) for argument in SCRIPTS[script]]
    job = launcher.run(2, str(program), *given, timeout_seconds=150, prepared=imported(script))
    output = job.output
    assert job.status == 0, output
    accuracies = re.findall(r"accuracy ([\d.]+) on 2 ranks", output)
    speeds = re.findall(r"total images/s on 2 ranks: ([\d.]+)", output)
    assert accuracies or speeds, output
    assert all(float(value) > LEARNED for value in accuracies[-1:]), output
    assert all(float(value) > 0 for value in speeds)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_import_is_all_that_names_horovod(script: str) -> None:
    program, before, after = changed(script)
    assert program.splitlines() == [
        after if line == before else line for line in FOLDER.joinpath(script).read_text().splitlines()
    ]
    assert "horovod" not in re.sub(r'^""".*?"""', "", program, flags=re.DOTALL).lower()


@pytest.mark.parametrize("script", TRAINED)
def test_a_script_trains_with_only_its_import_changed(script: str, tmp_path: Path) -> None:
    program, _, _ = changed(script)
    tmp_path.joinpath(script).write_text(program)
    check(OPEN_MPI, script, tmp_path / script, tmp_path)


@pytest.mark.parametrize("script", [script for script in TRAINED if script.startswith("pytorch")])
def test_a_script_trains_under_horovod(script: str, tmp_path: Path) -> None:
    """PyTorch's only: Horovod 0.28.1 cannot be built against this TensorFlow, and does not work with Keras 3."""
    HOROVOD_GLOO.need()
    check(HOROVOD_GLOO, script, FOLDER / script, tmp_path)
