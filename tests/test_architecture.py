"""What loads what, and what the public surface promises. import-linter reads the imports; these tests run them."""

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from framework_packages import FRAMEWORKS

import lentando

ROOT = Path(__file__).parents[1]
PACKAGES = [f"lentando.{module.name}" for module in pkgutil.iter_modules(lentando.__path__)]


def modules_in(package: str) -> Iterator[str]:
    """The names of a package and all modules below it, without importing any."""
    yield package
    for path in sorted(folder_of(package).rglob("*.py")):
        parts = path.relative_to(folder_of(package)).with_suffix("").parts
        if name := ".".join(part for part in parts if part != "__init__"):
            yield f"{package}.{name}"


def folder_of(package: str) -> Path:
    return (ROOT / "src" / package.replace(".", "/")).resolve()


def first_loaded_by(modules: list[str], watched: list[str]) -> dict[str, str]:
    """Imports the modules one after the other in a fresh interpreter: which one first loaded what is watched."""
    program = """
import importlib, json, sys
modules, watched = json.loads(sys.argv[1])
found = {}
for module in modules:
    importlib.import_module(module)
    for name in watched:
        if name in sys.modules:
            found.setdefault(name, module)
print(json.dumps(found))
"""
    finished = subprocess.run(
        [sys.executable, "-c", program, json.dumps([modules, watched])], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_lentando_comm_and_optimizers_load_neither_a_framework_nor_mpi():
    core = [*modules_in("lentando.comm"), *modules_in("lentando.optimizers")]
    assert "lentando.comm.reductions.ring_schedule" in core
    bindings = {f"lentando.comm.transports.horovod.{framework}_binding" for framework in FRAMEWORKS.values()}
    transports = [f"lentando.comm.transports.{name}" for name in ("mpi", "torch_distributed")]
    chosen_by_the_user = {*bindings, *(module for name in transports for module in modules_in(name))}
    assert chosen_by_the_user < set(core)
    modules = ["lentando", *(name for name in core if name not in chosen_by_the_user)]
    assert first_loaded_by(modules, ["torch", "tensorflow", "keras", "mpi4py.MPI", "cupy", "nccl"]) == {}


@pytest.mark.parametrize("package", sorted(FRAMEWORKS.keys() & PACKAGES))
def test_a_framework_package_loads_neither_another_framework_nor_mpi(package):
    own = FRAMEWORKS[package]
    pytest.importorskip(own)
    assert first_loaded_by([package], [*({*FRAMEWORKS.values()} - {own}), "mpi4py.MPI"]) == {}


@pytest.mark.parametrize("folder", ["comm", "optimizers"])
def test_a_folder_imported_by_its_own_name_says_what_to_import_instead(folder):
    finished = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert f"ImportError: import lentando.{folder}, not {folder}" in finished.stderr


def test_every_error_is_one_class():
    """Of two classes of one name, a program might raise or catch the one that is not meant."""
    found = {}
    for package in ("lentando.comm", "lentando.optimizers", *FRAMEWORKS):
        for path in sorted(folder_of(package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and any(is_error(base) for base in node.bases):
                    found.setdefault(node.name, set()).add(path)
    assert "MismatchError" in found
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def is_error(base: ast.expr) -> bool:
    return ast.unparse(base).endswith(("Error", "Exception"))


@pytest.mark.parametrize("package", ["lentando", *PACKAGES])
def test_every_name_in_all_exists(package):
    if package in FRAMEWORKS:
        pytest.importorskip(FRAMEWORKS[package])
    module = importlib.import_module(package)
    public = getattr(module, "__all__", [])
    assert public or package == "lentando.comm", "users import from here"
    assert [name for name in public if not hasattr(module, name)] == []


def public_methods(owner: ast.ClassDef) -> dict[str, bool]:
    """By name, whether any definition of the method (an overload, a getter, a setter) has a docstring."""
    found: dict[str, bool] = {}
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = found.get(node.name, False) or ast.get_docstring(node) is not None
    return found


def base_names(owner: ast.ClassDef) -> set[str]:
    return {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in owner.bases}


def is_overload(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def without_docstring(folders: list[Path]) -> list[str]:
    """Public functions, classes and methods that lack documentation, read from the source: to import it all starts MPI.

    A method is documented by its own docstring, by that of a base class, or by a protocol that its class fulfils.
    """
    defined = [
        (f"{path.relative_to(ROOT)}: {node.name}", node)
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    definitions = [(where, node) for where, node in defined if not node.name.startswith("_") and not is_overload(node)]
    classes = {node.name: node for _, node in defined if isinstance(node, ast.ClassDef)}
    protocols = [public_methods(node) for node in classes.values() if "Protocol" in base_names(node)]

    @cache
    def with_inherited(owner: ast.ClassDef) -> dict[str, bool]:
        inherited = [with_inherited(classes[base]) for base in base_names(owner) & classes.keys()]
        found = public_methods(owner)
        for methods in inherited:
            found = {name: found.get(name, False) or methods.get(name, False) for name in found | methods}
        return found

    def is_documented(owner: ast.ClassDef, method: str) -> bool:
        own = with_inherited(owner)
        return own[method] or any(protocol.get(method) for protocol in protocols if protocol.keys() <= own.keys())

    missing = [where for where, node in definitions if ast.get_docstring(node) is None]
    for where, node in definitions:
        if isinstance(node, ast.ClassDef):
            missing += [f"{where}.{name}" for name in public_methods(node) if not is_documented(node, name)]
    return missing


def test_everything_public_in_comm_and_optimizers_is_documented():
    assert without_docstring([ROOT / "comm", ROOT / "optimizers"]) == []


def test_a_missing_docstring_is_found(tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text('''
class Seam(Protocol):
    """Documented."""
    def move(self):
        """Documented."""
class Fulfils:
    """Documented."""
    def move(self): ...
class Base:
    """Documented."""
    def stop(self):
        """Documented."""
class Derived(Base):
    """Documented."""
    def stop(self): ...
    def found_method(self): ...
    def _private(self): ...
class FoundClass: ...
def found_function(): ...
def _private(): ...
''')
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert without_docstring([tmp_path]) == [
        "module.py: FoundClass",
        "module.py: found_function",
        "module.py: Derived.found_method",
    ]
