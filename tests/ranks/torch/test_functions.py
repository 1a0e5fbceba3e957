"""Horovod's functions under Horovod's names."""

from typing import Any

import pytest
import torch

import lentando.torch as lt


def own(shape: tuple[int, ...] = (3, 2), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float(lt.rank() + 1)).to(dtype)


TOTAL = {"sum": lambda n: n * (n + 1) / 2, "average": lambda n: (n + 1) / 2, "min": lambda n: 1, "max": lambda n: n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("op", "name"), [(lt.Sum, "sum"), (lt.Average, "average"), (lt.Min, "min"), (lt.Max, "max")])
def test_allreduce_combines_and_leaves_its_argument(op: Any, name: str, dtype: torch.dtype) -> None:
    tensor = own(dtype=dtype)
    result = lt.allreduce(tensor, op=op)
    assert torch.equal(result, torch.full((3, 2), float(TOTAL[name](lt.size()))).to(dtype))
    assert torch.equal(tensor, own(dtype=dtype))


def test_allreduce_averages_by_default_and_knows_the_older_argument() -> None:
    assert torch.equal(lt.allreduce(own()), lt.allreduce(own(), op=lt.Average))
    assert torch.equal(lt.allreduce(own(), False), lt.allreduce(own(), op=lt.Sum))
    with pytest.raises(lt.ConfigurationError, match="not both"):
        lt.allreduce(own(), True, op=lt.Sum)


def test_allreduce_scales_before_and_after() -> None:
    scaled = lt.allreduce(own(), op=lt.Sum, prescale_factor=0.5, postscale_factor=4.0)
    assert torch.equal(scaled, lt.allreduce(own(), op=lt.Sum) * 2)


def test_allreduce_in_place_works_on_views() -> None:
    tensor = torch.zeros(4, 3)
    view = tensor[:, 1]
    view += lt.rank() + 1
    assert lt.allreduce_(view, op=lt.Sum) is view
    assert torch.equal(tensor[:, 1], torch.full((4,), TOTAL["sum"](lt.size())))
    assert not tensor[:, 0].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
def test_allreduce_of_integers_sums_and_averages_towards_zero(dtype: torch.dtype) -> None:
    sign = -1 if dtype.is_signed else 1
    own = torch.tensor([sign * (lt.rank() + 2)], dtype=dtype)
    total = sum(range(2, lt.size() + 2))
    assert lt.allreduce(own, op=lt.Sum).item() == sign * total
    averaged = lt.allreduce(own)
    assert averaged.dtype == dtype
    assert averaged.item() == sign * (total // lt.size())


def test_allgather_joins_tensors_of_different_lengths() -> None:
    gathered = lt.allgather(torch.full((lt.rank() + 1, 2), lt.rank(), dtype=torch.bfloat16))
    expected = torch.cat([torch.full((rank + 1, 2), rank, dtype=torch.bfloat16) for rank in range(lt.size())])
    assert torch.equal(gathered, expected)
    assert lt.allgather(torch.tensor(lt.rank())).tolist() == list(range(lt.size()))


def test_broadcast_from_every_root() -> None:
    for root in range(lt.size()):
        tensor = own()
        assert (lt.broadcast(tensor, root) == root + 1).all()
        assert torch.equal(tensor, own())
        lt.broadcast_(tensor, root_rank=root)
        assert (tensor == root + 1).all()
    with pytest.raises(lt.ConfigurationError, match=f"0 to {lt.size() - 1}, got {lt.size()}"):
        lt.broadcast(own(), lt.size())


def test_collectives_have_the_module_of_horovods_from_which_programs_import_them() -> None:
    for name in ("Adasum", "Average", "Sum", "allgather", "allreduce_async_", "poll", "rank", "size", "synchronize"):
        assert getattr(lt.mpi_ops, name) is getattr(lt, name)


def test_broadcast_parameters_takes_state_dicts_and_named_parameters() -> None:
    for params in (lambda m: m.state_dict(), lambda m: m.named_parameters()):
        torch.manual_seed(lt.rank())
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        lt.broadcast_parameters(params(model), root_rank=lt.size() - 1)
        torch.manual_seed(lt.size() - 1)
        assert torch.equal(model[0].weight, torch.nn.Linear(3, 3).weight)


def test_broadcast_optimizer_state_gives_all_the_roots_momentum_and_learning_rate() -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * (lt.rank() + 1), betas=(0.8, 0.9))
    if lt.rank() == 0:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    lt.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    state = optimizer.state[model.weight]
    assert state["step"] == 1
    for other in lt.allgather_object(state["exp_avg"]):
        assert torch.equal(other, state["exp_avg"])


def test_objects_travel_with_their_tensors() -> None:
    value = {"tensor": own(), "nested": [1, (2.5, None)], 3: "x"} if lt.rank() == 0 else None
    received = lt.broadcast_object(value)
    assert torch.equal(received["tensor"], torch.ones(3, 2))
    assert received["nested"] == [1, (2.5, None)]
    assert received[3] == "x"
    assert [item["rank"] for item in lt.allgather_object({"rank": lt.rank()})] == list(range(lt.size()))


def test_ranks_that_call_different_things_get_an_error_that_names_them() -> None:
    if lt.size() == 1:
        return
    different = (
        (lambda: lt.allreduce(own(), name="a", op=lt.Sum)) if lt.rank() == 0 else (lambda: lt.broadcast(own(), 0))
    )
    with pytest.raises(
        lt.MismatchError, match=r"rank 0: calls allreduce\(\[3, 2\], float32, sum\) named 'a'.*broadcast"
    ):
        different()
    with pytest.raises(lt.MismatchError, match=r"rank 0: calls allreduce\(\[2\], float32, average\)"):
        lt.allreduce(torch.ones(1 + (lt.rank() == 0)))
    lt.barrier()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", [lt.Max, lt.Min])
def test_nan_of_one_rank_is_the_extreme_on_every_rank(op: Any, dtype: torch.dtype) -> None:
    for where in range(lt.size()):
        own_value = float("nan") if lt.rank() == where else 1.0
        found = lt.allreduce(torch.tensor([own_value, float(lt.rank())], dtype=dtype), op=op)
        assert found[0].isnan()
        assert found[1] == (lt.size() - 1 if op is lt.Max else 0)
        bits = lt.allgather(found.view(torch.uint8).reshape(1, -1))
        assert (bits == bits[0]).all()
