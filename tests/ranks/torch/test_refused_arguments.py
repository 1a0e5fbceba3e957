"""Arguments that cannot work on one rank alone are an error on every rank, and no rank waits for another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lentando.torch as lt


def odd_one() -> bool:
    return lt.rank() == lt.size() - 1


def either(wrong: Any, right: Any) -> Any:
    return wrong if odd_one() else right


def ones() -> torch.Tensor:
    return torch.ones(lt.size())


def trained() -> torch.Tensor:
    """A tensor that needs a gradient, and is no leaf."""
    return torch.ones(lt.size(), requires_grad=True) * 2


CALLS: dict[str, Callable[[], Any]] = {
    "no tensor": lambda: lt.allreduce_(either(None, ones())),
    "sparse": lambda: lt.allgather(either(torch.eye(lt.size()).to_sparse(), torch.eye(lt.size()))),
    "meta": lambda: lt.broadcast(either(ones().to("meta"), ones()), 0),
    "no tensors": lambda: lt.grouped_allreduce(either(None, [ones()])),
    "None in a group": lambda: lt.grouped_allreduce_([ones(), either(None, ones())]),
    "gradient of a minimum": lambda: lt.allreduce(either(trained(), ones()), op=lt.Min),
    "gradient in place": lambda: lt.allreduce_(either(trained(), ones())),
    "op and average": lambda: lt.allreduce(ones(), either(True, None), op=lt.Sum),
    "root": lambda: lt.broadcast_(ones(), either(lt.size(), 0)),
    "bool": lambda: lt.reducescatter(either(ones().bool(), ones())),
    "large number": lambda: lt.allreduce(either(2**63, 1), op=lt.Sum),
    "large number, scaled": lambda: lt.allreduce(either(10**400, 1), prescale_factor=0.5),
    "splits": lambda: lt.alltoall(ones(), either([[1], [1, 2]], [1] * lt.size())),
    "async": lambda: lt.synchronize(lt.allreduce_async(either(None, ones()))),
    "async in place": lambda: lt.synchronize(lt.allreduce_async_(either(trained(), ones()), name="in place")),
    "async group": lambda: lt.synchronize(lt.grouped_allreduce_async(either(3, [ones()]), name="group")),
    "async op": lambda: lt.synchronize(lt.allreduce_async(ones().int(), op=either(lt.Adasum, lt.Sum), name="op")),
    "async sparse": lambda: lt.synchronize(lt.sparse_allreduce_async(either(ones(), ones().to_sparse()), "sparse")),
    "async sparse op": lambda: lt.synchronize(
        lt.sparse_allreduce_async(ones().to_sparse(), "s", either(lt.Max, lt.Sum))
    ),
    "sparse shapes": lambda: lt.synchronize(
        lt.sparse_allreduce_async(torch.ones(either(3, 10)).to_sparse(), "shapes", lt.Sum)
    ),
}


@pytest.mark.skipif("lt.size() == 1", reason="one rank has no others")
@pytest.mark.parametrize("name", CALLS)
def test_a_mistake_of_one_rank_is_an_error_on_every_rank(name: str) -> None:
    with pytest.raises(lt.MismatchError, match=f"rank {lt.size() - 1}: "):
        CALLS[name]()
    lt.barrier()


def test_a_mistake_of_all_ranks_keeps_its_class() -> None:
    with pytest.raises(lt.UnsupportedOperationError, match="Adasum of int32"):
        lt.allreduce_(ones().int(), op=lt.Adasum)
    with pytest.raises(lt.UnsupportedOperationError, match="Adasum of int32"):
        lt.synchronize(lt.allreduce_async(ones().int(), op=lt.Adasum))
    with pytest.raises(lt.ConfigurationError, match="grouped_allreduce_ expects a torch.Tensor, got NoneType"):
        lt.grouped_allreduce_([None])  # type: ignore[list-item]
    lt.barrier()


GROUPED: dict[str, tuple[Callable[[Any], Any], float]] = {
    "grouped_allreduce": (lambda tensors: lt.grouped_allreduce(tensors, op=lt.Sum), 2.0),
    "grouped_allreduce_": (lambda tensors: lt.grouped_allreduce_(tensors, op=lt.Sum), 2.0),
    "grouped_allreduce_async": (lambda t: lt.synchronize(lt.grouped_allreduce_async(t, op=lt.Sum)), 2.0),
    "grouped_allreduce_async_": (lambda t: lt.synchronize(lt.grouped_allreduce_async_(t, op=lt.Sum)), 2.0),
    "grouped_reducescatter": (lambda tensors: lt.grouped_reducescatter(tensors, op=lt.Sum), 2.0),
    "grouped_reducescatter_async": (lambda t: lt.synchronize(lt.grouped_reducescatter_async(t, op=lt.Sum)), 2.0),
}


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_may_be_a_generator(name: str) -> None:
    function, value = GROUPED[name]
    tensors = [ones(), 2 * ones()]
    results = function(tensor for tensor in tensors)
    assert [result[0].item() for result in results] == [lt.size(), value * lt.size()]
    if name.endswith("_"):
        assert all(result is tensor for result, tensor in zip(results, tensors, strict=True))


def test_a_group_to_gather_may_be_a_generator() -> None:
    for gathered in (
        lt.grouped_allgather(tensor for tensor in (ones(), 2 * ones())),
        lt.synchronize(lt.grouped_allgather_async(tensor for tensor in (ones(), 2 * ones()))),
    ):
        assert [tensor.tolist() for tensor in gathered] == [[1.0] * lt.size() ** 2, [2.0] * lt.size() ** 2]


def test_a_sum_of_sparse_integers_is_one_of_integers() -> None:
    for dtype in (torch.int64, torch.float32, torch.bfloat16):
        sparse = torch.tensor([0, lt.rank() + 1, 0]).to(dtype).to_sparse()
        total = lt.synchronize(lt.sparse_allreduce_async(sparse, name="sum", op=lt.Sum)).to_dense()
        assert total.dtype == dtype
        assert total.tolist() == [0, lt.size() * (lt.size() + 1) // 2, 0]
