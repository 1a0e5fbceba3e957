"""The files, functions and commands that the documentation names exist."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
from launching import mpirun
from pages import PAGES, ROOT, blocks

from lentando.cli.app import run

FOLDERS = ("comm", "optimizers", "frameworks", "cli", "examples", "benchmarks", "tests", "docs", ".ci")
OF_OTHERS = {"train.py", "train_lentando.py"}
"""Files of the reader's own, and of Horovod's tests."""
OF_OTHERS |= {"test_torch.py", "test_adasum_pytorch.py", "test_tensorflow.py", "test_tensorflow2_keras.py"}
OF_OTHERS |= {"test_keras.py", "test_tensorflow_keras.py"}

FILE = re.compile(r"(?:[\w.*]+/)*[\w*]+\.py\b")
DEFINITION = re.compile(r"`(\w+(?:\.\w+)*)`\s+\(`([\w/]+\.py)`\)")
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")


@cache
def files() -> list[str]:
    """Paths of all files, relative to the root."""
    return [str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def exists(name: str) -> bool:
    """Whether a file exists: as a path from the root, or, of a name alone, anywhere."""
    if "/" not in name:
        return any(file.rpartition("/")[2] == name for file in files())
    return any(ROOT.glob(name))


def definitions(file: Path) -> set[str]:
    """Names that a file defines, methods as ``Class.method``."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = {name.removeprefix("../") for name in FILE.findall(page.read_text())} - OF_OTHERS
    assert sorted(name for name in named if not exists(name)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_definition_that_a_page_names_exists(page: Path) -> None:
    named = set(DEFINITION.findall(page.read_text()))
    assert sorted((name, file) for name, file in named if name not in definitions(ROOT / file)) == []
    assert len(named) > 30 or page.name != "architecture.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = {link for link in LINK.findall(page.read_text().replace("\n", "")) if "://" not in link}
    assert sorted(link for link in links if not (page.parent / link).exists()) == []


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"`make ([a-z-]+)`", page.read_text())}
    assert named <= targets
    assert "check" in named


@pytest.mark.parametrize("name", ["optimizers/replica/replica.py", "tests/ranks/*/test_fork.py", "test_topology.py"])
def test_a_file_is_found_by_its_path_or_its_name(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize("name", ["optimizers/replica/no_such_file.py", "tests/*/no_such_file.py", "no_such_file.py"])
def test_a_file_that_does_not_exist_is_not_found(name: str) -> None:
    assert not exists(name)


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def check_what_was_recorded(folder: Path) -> None:
    """The commands of the quick start draw the log, and merge the timelines of all ranks."""
    assert run(["timeline", str(folder / "runs/timeline")]) == 0
    assert {event["pid"] for event in json.loads((folder / "runs/timeline/merged.json").read_text())} == {0, 1}
    assert run(["report", str(folder / "runs/first")]) == 0
    assert "loss against time" in (folder / "runs/first/report.html").read_text()


def test_the_script_of_the_readme_trains_and_shows_what_it_did_as_the_quick_start_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    (script,) = blocks(ROOT / "README.md", "python")
    before, after = blocks(ROOT / "docs/quick_start.md", "python")[1].splitlines()
    script = script.replace("for epoch", f"{before}\nfor epoch").replace(
        "with optimizer", f"    {after}\nwith optimizer"
    )
    program = tmp_path / "train.py"
    program.write_text(script)
    monkeypatch.chdir(tmp_path)
    job = mpirun(2, str(program), timeout_seconds=240, environment={"LENTANDO_TIMELINE": "runs/timeline"})
    assert job.status == 0, job.output
    accuracies = dict(re.findall(r"^(\d) (0\.\d+)$", job.output, re.MULTILINE))
    assert set(accuracies) == {"0", "1"}
    assert min(map(float, accuracies.values())) > 0.9
    check_what_was_recorded(tmp_path)


def test_the_example_for_keras_trains_and_shows_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorflow")
    (callbacks,) = re.findall(r"`(callbacks=.*?)` in `fit`", (ROOT / "docs/quick_start.md").read_text())
    program = tmp_path / "train.py"
    script = (ROOT / "examples" / "minimal_keras.py").read_text()
    program.write_text(script.replace("verbose=2 if", f"{callbacks}, verbose=2 if"))
    monkeypatch.chdir(tmp_path)
    recorded: dict[str, str | None] = {"LENTANDO_TIMELINE": "runs/timeline"}
    job = mpirun(2, str(program), timeout_seconds=240, environment=recorded, prepared="lentando.tensorflow")
    assert job.status == 0, job.output
    accuracies = [float(accuracy) for accuracy in re.findall(r"accuracy (0\.\d+) on its shard", job.output)]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.9
    check_what_was_recorded(tmp_path)
