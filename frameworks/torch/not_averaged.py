"""The tensors of a model that are sent from rank 0 and saved, but not averaged, as plain dense tensors."""

import logging
from collections.abc import Mapping

import torch

from lentando.torch.local_tensors import as_complex, as_real, write

__all__ = ["Unaveraged", "parts_of", "store_parts"]

_log = logging.getLogger("lentando")

COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
"""Names of the methods that return the indices of a compressed sparse tensor, by layout."""


def parts_of(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Represent a tensor by dense tensors of dtypes that checkpoints contain, by name.

    A dense tensor is its own part; the parts of a sparse tensor are its indices and values. float8 is viewed as bytes,
    complex128 and complex32 as pairs of real numbers.

    Args:
        name: name of the tensor. The parts of a sparse tensor are named ``name.indices``, ``name.values`` and so on.
        tensor: dense or sparse tensor.
    """
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return {f"{name}.indices": tensor.indices(), f"{name}.values": _plain(tensor.values())}
    if tensor.layout in COMPRESSED:
        indices = {f"{name}.{method}": getattr(tensor, method)() for method in COMPRESSED[tensor.layout]}
        return {**indices, f"{name}.values": _plain(tensor.values())}
    return {name: _plain(tensor)}


def store_parts(name: str, tensor: torch.Tensor, given: Mapping[str, torch.Tensor]) -> None:
    """Fill a tensor with the parts that ``parts_of`` returned for another one, if all of them are given."""
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
    """Warns of floating-point tensors that cannot be averaged (float8, sparse) but change while the model is trained.

    Those that do not change stay equal on all ranks.

    Args:
        tensors: the tensors of the model that are not averaged, by name. Copies of the float8 and sparse ones are kept.

    Attributes:
        exist: whether there are such tensors.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._noted = {
            name: {part: values.detach().clone() for part, values in parts_of(name, tensor).items()}
            for name, tensor in tensors.items()
            if (tensor.layout is not torch.strided or (tensor.is_floating_point() and tensor.element_size() == 1))
        }
        self.exist = bool(self._noted)

    def warn_of_changes(self, now: Mapping[str, torch.Tensor]) -> None:
        """Warn once of each tensor that has changed, because the ranks have different values from now on.

        Args:
            now: the present tensors by name.
        """
        for name, noted in list(self._noted.items()):
            parts = parts_of(name, now[name]) if name in now else {}
            if all(part in parts and torch.equal(values, parts[part]) for part, values in noted.items()):
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
    """Convert the result of ``_plain`` back to the original dtype."""
    if plain.dtype == dtype or not (dtype.is_complex or (dtype.is_floating_point and dtype.itemsize == 1)):
        return plain
    return as_complex(plain) if dtype.is_complex else plain.view(dtype)
