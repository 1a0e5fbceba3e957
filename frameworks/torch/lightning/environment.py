"""The job of ``lt.init()`` as Lightning sees it, and the device of each rank."""

from collections.abc import Sequence

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from lentando.comm.errors import ConfigurationError
from lentando.comm.world import cross_rank, cross_size, local_rank, local_size, rank, size

__all__ = ["JobEnvironment", "check_places", "device_of_rank"]


class JobEnvironment(ClusterEnvironment):
    """The job of ``lt.init()``, in place of those that Lightning would look for."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        raise ConfigurationError("Lentando's ranks have no main address: torch.distributed is not used")

    @property
    def main_port(self) -> int:
        raise ConfigurationError("Lentando's ranks have no main port: torch.distributed is not used")

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return size()

    def set_world_size(self, size: int) -> None:
        """Keep the launcher's number."""

    def global_rank(self) -> int:
        return rank()

    def set_global_rank(self, rank: int) -> None:
        """Keep the launcher's number."""

    def local_rank(self) -> int:
        return local_rank()

    def node_rank(self) -> int:
        return cross_rank()


def device_of_rank(devices: Sequence[torch.device]) -> torch.device:
    """The device of this rank among those of its node."""
    return devices[local_rank() % len(devices)] if devices else torch.device("cpu")


def check_places(devices: Sequence[torch.device], nodes: int) -> None:
    """Check the numbers of devices and nodes that a Trainer was given.

    Args:
        devices: devices of this node that the Trainer would use.
        nodes: its number of nodes.

    Raises:
        ConfigurationError: if they do not agree with the ranks that the launcher has started.
    """
    ranks, given = local_size(), len(devices)
    if nodes not in (1, cross_size()):
        raise ConfigurationError(
            f"Trainer(num_nodes={nodes}), but the launcher has started ranks on {cross_size()} node(s): leave "
            "num_nodes out"
        )
    if device_of_rank(devices).type == "cuda":
        if given == 1 < ranks and torch.cuda.device_count() > 1:
            raise ConfigurationError(
                f"Trainer(devices=1) puts all {ranks} ranks of this node on one of its {torch.cuda.device_count()} "
                "GPUs: leave devices out"
            )
    elif given not in (1, ranks):
        raise ConfigurationError(
            f"Trainer(devices={given}), but the launcher has started {ranks} rank(s) on this node, and with this "
            f"strategy Lightning starts none: use mpirun -np {given} or torchrun --nproc-per-node {given}, and leave "
            "devices out"
        )
