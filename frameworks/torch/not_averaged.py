"""The rest of a model's state, which is taken over from rank 0 and saved, but not averaged, as plain dense tensors."""

import logging
from collections.abc import Callable, Mapping

import torch

from lentando.torch.wrappable import as_real, write

__all__ = ["Unaveraged", "parts_of", "store_parts"]

_log = logging.getLogger("lentando")

COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
"""The methods that give the indices of a compressed sparse tensor, by layout."""


def parts_of(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor as dense tensors of dtypes that checkpoints hold: itself, or a sparse one's indices and values.

    Args:
        name: what the tensor is called. Parts of a sparse tensor are called ``name.indices`` and the like.
        tensor: dense or sparse. float8 comes back as bytes, complex128 and complex32 as pairs of real numbers.
    """
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return {f"{name}.indices": tensor.indices(), f"{name}.values": _plain(tensor.values())}
    if tensor.layout in COMPRESSED:
        indices = {f"{name}.{method}": getattr(tensor, method)() for method in COMPRESSED[tensor.layout]}
        return {**indices, f"{name}.values": _plain(tensor.values())}
    return {name: _plain(tensor)}


def store_parts(name: str, tensor: torch.Tensor, given: Mapping[str, torch.Tensor]) -> None:
    """Fill a tensor with what ``parts_of`` gave of another one, if it is among what is given."""
    if not parts_of(name, tensor).keys() <= given.keys():
        return
    if tensor.layout is torch.sparse_coo:
        indices, values = given[f"{name}.indices"], _like(given[f"{name}.values"], tensor.dtype)
        tensor.copy_(torch.sparse_coo_tensor(indices, values, tensor.shape, check_invariants=True))
        return
    if tensor.layout in COMPRESSED:
        for method in COMPRESSED[tensor.layout]:
            getattr(tensor, method)().copy_(given[f"{name}.{method}"])
        tensor.values().copy_(_like(given[f"{name}.values"], tensor.dtype))
        return
    write(tensor, _like(given[name], tensor.dtype))


class Unaveraged:
    """Warns of floating-point tensors that cannot be averaged (float8, sparse) and change while the model is trained.

    Constant ones are equal on all ranks, which is all that is needed.
    """

    def __init__(self) -> None:
        self._noted: dict[str, dict[str, torch.Tensor]] = {}

    def note(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Remember what these are now, if no gradient is expected for them."""
        self._noted = {
            name: {part: own.detach().clone() for part, own in parts_of(name, tensor).items()}
            for name, tensor in tensors.items()
            if (tensor.layout is not torch.strided or (tensor.is_floating_point() and tensor.element_size() == 1))
        }

    def warn_of_changes(self, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Say once of each that has changed that ranks have different ones from now on.

        Args:
            tensors: gives what they are now; asked only if there are any.
        """
        if not self._noted:
            return
        now = tensors()
        for name, noted in list(self._noted.items()):
            parts = parts_of(name, now[name]) if name in now else {}
            if all(part in parts and torch.equal(own, parts[part]) for part, own in noted.items()):
                continue
            del self._noted[name]
            kind = now[name].layout if name in now and now[name].layout is not torch.strided else "float8"
            _log.warning(
                "buffer %r (%s) changes while the model is trained, and tensors of this kind are not averaged: each "
                "rank keeps its own. Keep it as a dense tensor of float32 to have it averaged, or register it with "
                "persistent=False if it may differ",
                name,
                kind,
            )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return tensor.view(torch.uint8)
    return as_real(tensor) if tensor.dtype in (torch.complex32, torch.complex128) else tensor


def _like(plain: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of ``_plain``."""
    if plain.dtype == dtype or not (dtype.is_complex or (dtype.is_floating_point and dtype.itemsize == 1)):
        return plain
    return torch.view_as_complex(plain) if dtype.is_complex else plain.view(dtype)
