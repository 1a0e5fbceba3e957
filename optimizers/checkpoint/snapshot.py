"""What one rank contributes to a checkpoint, before any file is written."""

from hashlib import blake2b
from typing import Any

import numpy as np

from lentando.comm.array_module import to_host
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import describe
from lentando.comm.objects import broadcast_object
from lentando.comm.transport import Array, Transport, as_bytes
from lentando.optimizers.checkpoint.elements import in_shape
from lentando.optimizers.checkpoint.rank_content import RankContent, Tensors
from lentando.optimizers.checkpoint.training import Training
from lentando.optimizers.checkpoint.tree import pack

__all__ = ["equal_on_all_ranks", "manifest_content", "snapshot"]


def snapshot(training: Training, extra: Any) -> RankContent:
    """This rank's tensors, and JSON that describes them and the rest of its state.

    Args:
        training: the training that is saved.
        extra: what the program saves in addition.

    Raises:
        ConfigurationError: if ``extra`` or the base optimizer's state contains an object that cannot be saved.
    """
    framework = training.replica.framework
    framework.load()
    layouts = [buffer.layout for buffer in framework.buffers]
    tensors: Tensors = {}
    for buffer in framework.buffers:
        elements = to_host(buffer.array)
        for entry, start in zip(buffer.layout.entries, buffer.layout.offsets, strict=True):
            tensors[f"model/{entry.name}"] = in_shape(elements[start : start + entry.size], entry)
    not_averaged = framework.not_averaged()
    tensors |= {f"model/{name}": array for name, array in not_averaged.items()}
    optimizer = training.optimizer_state()
    for key, by_name in optimizer.tensors.items():
        tensors |= {f"optimizer/{key}/{name}": array for name, array in by_name.items()}
    about: dict[str, Any] = {
        "framework": framework.name,  # ranks of one job may run different ones
        "not_averaged": [[name, list(array.shape), array.dtype.name] for name, array in not_averaged.items()],
    }
    replica = {key: item for key, item in training.replica.state_dict().items() if key != "settings"}  # in the manifest
    trees = (
        ("replica", replica),
        ("optimizer rest", optimizer.rest),
        ("random", training.random_state()),
        ("extra", training.to_plain(extra)),
    )
    for name, tree in trees:
        about[name], packed = pack(tree, layouts, name)
        tensors |= packed
    names = {key: list(by_name) for key, by_name in optimizer.tensors.items()}
    about["optimizer"] = {**optimizer.about(), "names": names}
    return RankContent(tensors, about)


def manifest_content(training: Training) -> dict[str, Any]:
    """What must be known before any tensor is read, equal on all ranks: the manifest's entries but for the files."""
    replica = training.replica
    layers, reason = _layers(training)
    return {
        "framework": replica.framework.name,
        "world_size": replica.transport.size,
        "inner_steps": replica.inner_steps,
        "rounds": replica.rounds,
        "settings": replica.settings.method,
        "entries": describe(buffer.layout for buffer in replica.framework.buffers),
        "layers": layers,
        "why_no_layers": reason,
    }


def equal_on_all_ranks(transport: Transport, tensors: Tensors) -> set[str]:
    """Names of the tensors that are equal on all ranks, and need to be written only once. Collective.

    Args:
        transport: transport that connects the ranks.
        tensors: this rank's tensors, by name.
    """
    digests = {name: _digest(array) for name, array in tensors.items()}
    first = broadcast_object(transport, digests)
    equal = np.array([digests.get(name) == digest for name, digest in first.items()], np.uint8)
    everywhere = transport.allgather(equal).min(axis=0)
    return {name for number, name in enumerate(first) if everywhere[number]}


def _layers(training: Training) -> tuple[list[Any] | None, str]:
    """The model's layers as JSON, or None and the reason why they are not known, which is no reason not to save."""
    try:
        layers = training.layers()
    except ConfigurationError as error:
        return None, str(error)
    if layers is None:
        return None, "no model= was given when it was saved"
    return [layer.as_json() for layer in layers], ""


def _digest(array: Array) -> str:
    digest = blake2b(f"{array.dtype.name} {array.shape}".encode(), digest_size=16)
    digest.update(as_bytes(np.ascontiguousarray(array)).data)
    return digest.hexdigest()
