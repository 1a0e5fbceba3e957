"""The registration of backend ``lentando`` in torch.distributed."""

from typing import Any

from torch import distributed as dist

from lentando.c10d.members import open_members
from lentando.c10d.process_group import LentandoProcessGroup

__all__ = ["register"]


def register() -> None:
    """Let ``init_process_group("lentando")`` and ``new_group(backend="lentando")`` find this backend."""
    dist.Backend.register_backend("lentando", _create, extended_api=True, devices=["cpu"])


def _create(options: Any, _: Any) -> LentandoProcessGroup:
    members = open_members(options.store, options.group_rank, options.group_size, options.group_id, options.timeout)
    return LentandoProcessGroup(members, options.timeout)
