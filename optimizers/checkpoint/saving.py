"""Saving: every rank writes what is its own, rank 0 what all share, and the manifest when all have written."""

from hashlib import blake2b
from os import PathLike
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np

from lentando.comm.array_module import to_host
from lentando.comm.control import Event
from lentando.comm.elastic import transaction
from lentando.comm.errors import CheckpointError, ConfigurationError, RankLostError, grouped_by_rank
from lentando.comm.flat import describe
from lentando.comm.objects import broadcast_object
from lentando.comm.transport import Array, Transport, as_bytes
from lentando.optimizers.checkpoint import folder as folders
from lentando.optimizers.checkpoint.elements import in_shape
from lentando.optimizers.checkpoint.part import Part, write_part
from lentando.optimizers.checkpoint.together import together
from lentando.optimizers.checkpoint.training import Checkpointed, Training, training_of
from lentando.optimizers.checkpoint.tree import pack

__all__ = ["save"]


def save(path: str | PathLike[str], optimizer: Checkpointed, extra: Any = None, *, keep: int | None = None) -> Path:
    """Save model, base optimizer and all that decides the next step of every rank, for any framework to go on from.

    Collective: every rank calls it, eagerly, between steps. A checkpoint appears when it is complete; until then, an
    earlier one at the same place stays what it was. The framework's own random generators, from which dropout draws,
    are saved with it (of Keras, the seed generators of a model given as ``model=``); those of Python and NumPy are not:
    give their states as ``extra``. With ``model=`` given to the optimizer, another framework can find out by itself
    which of its tensors is which parameter.

    Args:
        path: a folder that all ranks see; made if need be.
        optimizer: a ``DistributedOptimizer``; in TensorFlow, built.
        extra: whatever else this rank wants back (epoch, scheduler, random generators): None, numbers, strings, lists,
            tuples, dicts, arrays and tensors.
        keep: makes ``path`` a folder of checkpoints by step, ``step-00000480`` and so on, of which the newest so many
            are kept. Without it ``path`` is one checkpoint, which is replaced.

    Returns:
        The folder of this checkpoint.

    Raises:
        CheckpointError: on every rank, if one of them fails (disk full, ...); what was there before is still there.
        MismatchError: on every rank, if the ranks are not at the same step.
    """
    training = training_of(optimizer)
    if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
        raise ConfigurationError(f"keep must be an integer >= 1 (checkpoints), or None for one alone, got {keep!r}")
    transport, _, _ = training.replica.parts
    plain = training.to_plain(extra)
    return transaction(transport, lambda: _save(training, Path(path), plain, keep))


def _save(training: Training, path: Path, extra: Any, keep: int | None) -> Path:
    transport, _, _ = training.replica.parts
    steps = training.replica.inner_steps
    training.replica.meet(Event.SAVE)
    places = together(transport, "saving a checkpoint", lambda: f"saves to {path}, keep={keep}")
    if len(set(places)) > 1:
        raise CheckpointError(f"the ranks save to different places: {grouped_by_rank(places)}")
    mine: dict[str, Any] = {}
    together(transport, "saving a checkpoint", lambda: mine.update(_collected(training, extra)))
    shared = _equal_on_all_ranks(transport, mine["tensors"])
    is_first = transport.rank == 0

    def begin() -> list[str] | None:
        if not is_first:
            return None
        return [str(folders.begin(path, steps, keep)), f"step-{steps:08d}-{token_hex(4)}"]

    place, attempt = together(transport, f"saving a checkpoint to {path}", begin)[0] or ["", ""]
    folder = Path(place)
    own_file, shared_file = f"{attempt}-rank-{transport.rank:05d}.safetensors", f"{attempt}-shared.safetensors"

    def write() -> list[dict[str, Any]]:
        own = {name: array for name, array in mine["tensors"].items() if name not in shared}
        parts = [write_part(folder / own_file, own, mine["about"])]
        if is_first:
            common = {name: mine["tensors"][name] for name in shared}
            parts.append(write_part(folder / shared_file, common, None))
        return [part.as_json() for part in parts]

    try:
        parts = together(transport, f"saving a checkpoint to {folder}", write)
    except (CheckpointError, RankLostError):
        folders.discard(folder, [own_file, *([shared_file] if is_first else [])])
        raise

    def commit() -> None:
        if is_first:
            _check_visible(folder, parts)
            content = {**_described(training), "parts": {"ranks": [own[0] for own in parts], "shared": parts[0][1]}}
            folders.commit(folder, content)
            folders.tidy(folder, [part["file"] for own in parts for part in own])
            if keep is not None:
                folders.keep_last(path, keep)

    together(transport, f"saving a checkpoint to {folder}", commit)
    return folder


def _collected(training: Training, extra: Any) -> dict[str, Any]:
    """This rank's tensors, and JSON about them."""
    replica = training.replica
    _, framework, _ = replica.parts
    framework.load()
    layouts = [buffer.layout for buffer in framework.buffers]
    tensors: dict[str, Array] = {}
    for buffer in framework.buffers:
        elements = to_host(buffer.array)
        for entry, start in zip(buffer.layout.entries, buffer.layout.offsets, strict=True):
            tensors[f"model/{entry.name}"] = in_shape(elements[start : start + entry.size], entry)
    for name, array in framework.not_averaged().items():
        tensors[f"model/{name}"] = array
    state = training.optimizer_state()
    for key, by_name in state.tensors.items():
        tensors |= {f"optimizer/{key}/{name}": array for name, array in by_name.items()}
    about: dict[str, Any] = {
        "framework": framework.name,  # ranks of one job may run different ones
        "not_averaged": [[name, list(a.shape), a.dtype.name] for name, a in framework.not_averaged().items()],
    }
    trees = (
        ("replica", replica.state_dict()),
        ("optimizer rest", state.rest),
        ("random", training.random_state()),
        ("extra", extra),
    )
    for name, tree in trees:
        about[name], found = pack(tree, layouts, name)
        tensors |= found
    about["optimizer"] = {
        **state.about(),
        "names": {key: list(by_name) for key, by_name in state.tensors.items()},
    }
    return {"tensors": tensors, "about": about}


def _described(training: Training) -> dict[str, Any]:
    """What must be known before any tensor is read: the same on all ranks."""
    _, framework, settings = training.replica.parts
    layers, reason = _layers(training)
    return {
        "framework": framework.name,
        "world_size": training.replica.parts[0].size,
        "inner_steps": training.replica.inner_steps,
        "rounds": training.replica.rounds,
        "settings": settings.method_in_words(),
        "entries": describe(buffer.layout for buffer in framework.buffers),
        "layers": layers,
        "why_no_layers": reason,
    }


def _layers(training: Training) -> tuple[list[Any] | None, str]:
    """What the model consists of, or why that is not known: no reason not to save, only not to find a mapping."""
    try:
        layers = training.layers()
    except ConfigurationError as error:
        return None, str(error)
    return (None, "no model= was given when it was saved") if layers is None else ([x.as_json() for x in layers], "")


def _equal_on_all_ranks(transport: Transport, tensors: dict[str, Array]) -> set[str]:
    """The tensors that need to be written only once."""
    mine = {name: _digest(array) for name, array in tensors.items()}
    first = broadcast_object(transport, mine)
    equal = np.array([mine.get(name) == digest for name, digest in first.items()], np.uint8)
    everywhere = transport.allgather(equal).min(axis=0)
    return {name for number, name in enumerate(first) if everywhere[number]}


def _digest(array: Array) -> str:
    digest = blake2b(f"{array.dtype.name} {array.shape}".encode(), digest_size=16)
    digest.update(as_bytes(np.ascontiguousarray(array)).data)
    return digest.hexdigest()


def _check_visible(folder: Path, parts: list[list[dict[str, Any]]]) -> None:
    """What the other ranks wrote must be there for rank 0 as well."""
    for rank, own in enumerate(parts):
        for part in (Part(**described) for described in own):
            file = folder / part.file
            found = file.stat().st_size if file.exists() else "no"
            if found != part.size_bytes:
                raise CheckpointError(
                    f"rank {rank} wrote {part.size_bytes} bytes to {file}, but rank 0 sees {found} bytes there: "
                    "checkpoints need a file system that all ranks share"
                )
