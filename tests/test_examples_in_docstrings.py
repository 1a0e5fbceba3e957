"""Every ``>>>`` example in a docstring of the package runs, in one process, and the names users need most have one."""

import ast
import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from framework_packages import FRAMEWORKS, WITH_METHODS

from lentando.comm import topology, world

SOURCE = Path(__file__).parents[1] / "src"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

METHODS = ["AdaComm", "DiLoCo", "SlowMo"]
OF_FRAMEWORKS = [
    "DistributedOptimizer",
    "SGP",
    "WeightMap",
    "WeightRule",
    "load",
    "save",
]
OF_OPTIMIZERS = [
    "AdaptivePeriod",
    "AllReduce",
    "DPSGD",
    "FixedPeriod",
    "LocalSGD",
    "OSGP",
    "OuterSGD",
    "PostLocal",
    "SGP",
    "SlowMomentum",
    "planning",
    "testing.check_base_algorithm",
]
WITH_EXAMPLE = [
    *(f"{framework}.{name}" for framework in WITH_METHODS for name in OF_FRAMEWORKS),
    *(f"lentando.comm.topology.{name}" for name in topology.__all__ if name != "Stochasticity"),
    "lentando.comm.simulation.Compute",
    "lentando.comm.simulation.Network",
    "lentando.comm.simulation.simulate",
    "lentando.comm.testing.check_topology",
    "lentando.comm.testing.check_transport",
    "lentando.comm.testing.run_ranks",
    *(f"lentando.optimizers.{name}" for name in OF_OPTIMIZERS),
]
"""Public names whose docstrings show how they are used."""


def modules_with_examples() -> Iterator[tuple[str, Path]]:
    """Name and file of each module whose source contains an example, without importing any."""
    for package in sorted(path for path in (SOURCE / "lentando").iterdir() if (path / "__init__.py").exists()):
        for path in sorted(package.resolve().rglob("*.py")):
            if ">>>" in path.read_text():
                parts = (path.parent if path.name == "__init__.py" else path.with_suffix("")).relative_to(
                    package.resolve()
                )
                yield ".".join(["lentando", package.name, *parts.parts]), path


def documented(node: ast.AST, name: str) -> Iterator[tuple[str, str, int]]:
    """Qualified name, docstring and line of everything in a module that has a docstring with an example."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from documented(child, f"{name}.{child.name}")
    if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        text = ast.get_docstring(node)
        if text is not None and ">>>" in text:
            yield name, text, node.body[0].lineno - 1


SLOW = {
    "lentando.comm.simulation.run.simulate",
    "lentando.comm.testing.transports.check_transport",
    "lentando.tensorflow.keras.elastic.KerasState",
}
"""Examples that take more than 0.25 s."""

EXAMPLES = [
    pytest.param(module, path, text, line, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for module, path in modules_with_examples()
    for name, text, line in documented(ast.parse(path.read_text()), module)
]


def imported(module: str) -> Any:
    """The module, or a skipped test where its framework is not installed."""
    for package, framework in FRAMEWORKS.items():
        if module == package or module.startswith(f"{package}."):
            pytest.importorskip(framework)
    return importlib.import_module(module)


def run_example(text: str, globs: dict[str, Any], name: str, path: Path | None, line: int) -> None:
    """Run a docstring's examples; fail with doctest's report of those that print something else."""
    report: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, globs, name, path and str(path), line)
    results = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append)
    assert results.attempted > 0
    assert results.failed == 0, "".join(report)


@pytest.fixture(autouse=True)
def a_folder_of_its_own_and_a_job_that_ends(tmp_path, monkeypatch):
    """Examples may write files, and may call ``init()``: a process that was started alone is a world of 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LENTANDO_TRANSPORT", "single")  # also if another test of this process has initialised MPI
    yield
    world.shutdown()


@pytest.mark.parametrize(("module", "path", "text", "line"), EXAMPLES)
def test_the_example_runs(module, path, text, line, request):
    run_example(text, dict(vars(imported(module))), request.node.callspec.id, path, line)


def docstring_of(name: str) -> str:
    """The docstring that ``help`` shows for a public name."""
    if name == "lentando.optimizers.planning":
        return imported(name).__doc__
    module, _, attribute = name.rpartition(".")
    return inspect.cleandoc(getattr(imported(module), attribute).__doc__)


def statements_in(text: str) -> list[tuple[str, str]]:
    """Source and expected output of each statement of a docstring's example."""
    return [(statement.source, statement.want) for statement in doctest.DocTestParser().get_examples(text)]


RUN = [statements_in(parameters.values[2]) for parameters in EXAMPLES]
"""The examples that ``test_the_example_runs`` runs."""


@pytest.mark.parametrize("framework", WITH_METHODS)
@pytest.mark.parametrize("method", METHODS)
def test_the_example_that_a_method_has_from_its_base_class_runs(framework, method):
    text = docstring_of(f"{framework}.{method}")
    assert f"lt.{method}(" in text
    run_example(text, {}, f"{framework}.{method}", None, 0)


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_the_public_name_has_an_example_that_runs(name):
    text = docstring_of(name)
    assert ">>>" in text, f"{name} needs an example (lines that begin with >>>) in its docstring"
    assert statements_in(text) in RUN, f"what help shows for {name} is not the example of a docstring in the source"


def test_an_example_that_prints_something_else_is_reported():
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run_example(">>> 1 + 1\n3", {}, "wrong", None, 0)
