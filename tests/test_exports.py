"""What users write is exported once, by ``lentando.optimizers``, and by every framework package."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import lentando.optimizers
from lentando.comm import errors, topology

OWN_NAMES = {
    "lentando.torch": {
        "Handle",
        "SyncBatchNorm",
        "allgather_async",
        "allreduce_",
        "allreduce_async",
        "allreduce_async_",
        "alltoall_async",
        "broadcast_async",
        "broadcast_async_",
        "broadcast_optimizer_state",
        "broadcast_parameters",
        "grouped_allgather_async",
        "grouped_allreduce_",
        "grouped_allreduce_async",
        "grouped_allreduce_async_",
        "grouped_reducescatter_async",
        "poll",
        "reducescatter_async",
        "sparse_allreduce_async",
        "synchronize",
    },
    "lentando.tensorflow": {
        "AveragedModelCallback",
        "BroadcastGlobalVariablesCallback",
        "BroadcastGlobalVariablesHook",
        "DistributedGradientTape",
        "LentandoCallback",
        "MetricAverageCallback",
        "PartialDistributedGradientTape",
        "RunLogCallback",
        "SyncBatchNormalization",
        "broadcast_global_variables",
        "broadcast_object_fn",
        "broadcast_variables",
        "local_rank_op",
        "local_size_op",
        "original_errors",
        "process_set_included_op",
        "rank_op",
        "size_op",
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
    shared = {"AdaComm", "DiLoCo", "DistributedOptimizer", "SlowMo", "elastic", "layers"}
    shared |= {"Compression", "Compressor", "allgather", "allgather_object", "allreduce", "alltoall", "broadcast"}
    shared |= {"broadcast_", "broadcast_object", "grouped_allgather", "grouped_allreduce", "grouped_reducescatter"}
    shared |= {"reducescatter"}
    assert set(exported) == {*lentando.optimizers.__all__, *shared, *OWN_NAMES[package]}


def test_both_framework_packages_export_the_same_names_but_for_their_own() -> None:
    first, second = (set(framework_package(name).__all__) - own for name, own in OWN_NAMES.items())
    assert first == second


def test_every_topology_and_every_error_is_exported() -> None:
    assert set(topology.__all__) <= set(lentando.optimizers.__all__)
    classes = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert classes <= set(lentando.optimizers.__all__)


def test_every_rule_that_a_user_can_choose_is_exported() -> None:
    """What fulfils one of the seams: base algorithms, outer rules and periods."""
    seams = [{"averages_gradients", "communicates", "bind"}, {"keeps_momentum", "step"}, {"steps", "update"}]
    found = set()
    for path in Path(lentando.optimizers.__path__[0], "rules").glob("*.py"):
        module = importlib.import_module(f"lentando.optimizers.rules.{path.stem}")
        public = {name: getattr(module, name) for name in getattr(module, "__all__", [])}
        found |= {name for name, value in public.items() if any(seam <= set(dir(value)) for seam in seams)}
    assert {"AllReduce", "SGP", "OuterSGD", "OuterRule", "PostLocal", "Period"} <= found
    assert found <= set(lentando.optimizers.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error_and_a_folder_is_not_hidden() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        lentando.optimizers.Nonsense  # noqa: B018
    assert "SlowMomentum" in dir(lentando.optimizers)
    folders = {module.name for module in pkgutil.iter_modules(lentando.optimizers.__path__)}
    assert not folders & set(lentando.optimizers.__all__)
