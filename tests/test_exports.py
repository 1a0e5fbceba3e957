"""What users write is exported once, by ``lentando.optimizers``, and by every framework package."""

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import lentando.optimizers
from lentando.comm import errors, topology

OWN_NAMES = {
    "lentando.torch": {"allreduce_", "broadcast_", "broadcast_optimizer_state", "broadcast_parameters"},
    "lentando.tensorflow": {
        "AveragedModelCallback",
        "BroadcastGlobalVariablesCallback",
        "DistributedGradientTape",
        "LentandoCallback",
        "MetricAverageCallback",
        "broadcast_variables",
        "original_errors",
    },
}
"""What one framework package has and others do not, all of it Horovod's or Keras's."""


def framework_package(name: str) -> ModuleType:
    pytest.importorskip(name.rpartition(".")[2])
    return importlib.import_module(name)


@pytest.mark.parametrize("package", OWN_NAMES)
def test_a_framework_package_exports_the_shared_names_and_few_of_its_own(package: str) -> None:
    exported = framework_package(package).__all__
    assert len(exported) == len(set(exported))
    shared = {"AdaComm", "DiLoCo", "DistributedOptimizer", "SlowMo", "layers"}
    shared |= {"allgather", "allgather_object", "allreduce", "broadcast", "broadcast_object"}
    assert set(exported) == {*lentando.optimizers.__all__, *shared, *OWN_NAMES[package]}


def test_both_framework_packages_export_the_same_names_but_for_their_own() -> None:
    first, second = (set(framework_package(name).__all__) - own for name, own in OWN_NAMES.items())
    assert first == second


def test_every_topology_and_every_error_is_exported() -> None:
    assert set(topology.__all__) <= set(lentando.optimizers.__all__)
    classes = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert classes <= set(lentando.optimizers.__all__)


def test_every_class_that_a_user_could_pass_is_exported() -> None:
    """Every public dataclass and protocol of a rule or a topology, but for those that only the rules themselves use."""
    inside = {"Buckets", "Constant", "Constants", "NonFinite", "OuterStep", "OverlappedGradients", "PartialAverage"}
    inside |= {"PushSum", "Verdict"}
    folder = Path(lentando.optimizers.__path__[0], "rules")
    defined = set()
    for path in folder.glob("*.py"):
        classes = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
        module = importlib.import_module(f"lentando.optimizers.rules.{path.stem}")
        defined |= classes & set(getattr(module, "__all__", []))
    assert defined - set(lentando.optimizers.__all__) == inside


def test_a_name_that_is_not_there_is_an_attribute_error_and_a_folder_is_not_hidden() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        lentando.optimizers.Nonsense  # noqa: B018
    assert "SlowMomentum" in dir(lentando.optimizers)
    folders = {module.name for module in pkgutil.iter_modules(lentando.optimizers.__path__)}
    assert not folders & set(lentando.optimizers.__all__)
