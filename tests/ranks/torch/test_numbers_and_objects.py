"""Python numbers, boolean tensors, and objects of rare kinds."""

from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lentando.torch as lt

Point = namedtuple("Point", "a b")


def test_numbers_are_combined_and_keep_their_kind() -> None:
    n = lt.size()
    for value, op, expected in (
        (lt.rank() + 0.1, lt.Average, sum(rank + 0.1 for rank in range(n)) / n),
        (lt.rank() + 0.1, lt.Max, n - 1 + 0.1),
        (lt.rank() + 1, lt.Average, (n + 1) / 2),
        (2**60 - lt.rank(), lt.Min, 2**60 - n + 1),
        (lt.rank(), lt.Sum, n * (n - 1) // 2),
        (lt.rank() == 0, lt.Max, True),
        (lt.rank() == 0, lt.Min, n == 1),
        (lt.rank() < 2, lt.Sum, min(n, 2)),
        (lt.rank() < 2, lt.Average, min(n, 2) / n),
    ):
        found = lt.allreduce(value, op=op)
        assert type(found) is type(expected)
        assert found == pytest.approx(expected, rel=1e-15)
    assert lt.allreduce(1.0, op=lt.Sum, prescale_factor=0.5, postscale_factor=4.0) == 2.0 * n
    assert lt.allreduce(-(2**63), op=lt.Min) == -(2**63)
    with pytest.raises(lt.ConfigurationError, match="an integer of 65 bits"):
        lt.allreduce(2**64, op=lt.Sum)
    with pytest.raises(lt.ConfigurationError, match="an integer of 64 bits: expected 63 at most"):
        lt.allreduce(2**63, op=lt.Max)
    if n > 1:  # each fits, their sum does not
        with pytest.raises(lt.ConfigurationError, match="so that int64 holds the result"):
            lt.allreduce(2**62, op=lt.Sum)


@pytest.mark.parametrize("value", [None, "1", [1.0], 1j, np.float32(1.0), np.ones(2)])
def test_what_is_neither_a_tensor_nor_a_number_is_refused_by_its_kind(value: Any) -> None:
    for call in (lt.allreduce, lt.allgather, lambda value: lt.broadcast(value, 0)):
        with pytest.raises(lt.ConfigurationError, match=rf"expects a torch.Tensor.*, got {type(value).__name__}"):
            call(value)


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_tensors_without_dense_values_are_refused(tensor: torch.Tensor) -> None:
    for call in (lt.allreduce, lt.allgather, lambda value: lt.broadcast(value, 0)):
        with pytest.raises(lt.ConfigurationError, match="expects a dense tensor that holds values, got one that is "):
            call(tensor)


def test_factors_of_integer_tensors_round_towards_zero() -> None:
    values = torch.tensor([3, -3, 4])
    assert lt.allreduce(values, op=lt.Max, prescale_factor=0.5).tolist() == [1, -1, 2]
    assert lt.allreduce(values, op=lt.Max, postscale_factor=0.5).tolist() == [1, -1, 2]


def test_boolean_tensors_say_whether_any_or_all_ranks_have_true() -> None:
    own = torch.tensor([True, False, lt.rank() == 0])
    assert lt.allreduce(own, op=lt.Max).tolist() == [True, False, True]
    assert lt.allreduce(own, op=lt.Min).tolist() == [True, False, lt.size() == 1]
    assert lt.allreduce(own, op=lt.Max).dtype == torch.bool
    for op in (lt.Sum, lt.Average):
        with pytest.raises(lt.ConfigurationError, match=f"{op.name} of bool .* use op=Max"):
            lt.allreduce(own, op=op)


@pytest.mark.parametrize(
    "value",
    [
        b"raw",
        {1, "a"},
        Path("runs/first"),
        OrderedDict(b=[1], a=2),
        Counter("aab"),
        defaultdict(list, a=[1]),
        torch.Size([2, 3]),
        1 - 2j,
    ],
)
def test_objects_keep_their_kind(value: Any) -> None:
    expected = tuple(value) if isinstance(value, torch.Size) else value
    for found in (lt.broadcast_object(value), *lt.allgather_object(value)):
        assert type(found) is type(expected)
        assert found == expected


def test_state_dicts_and_tensors_of_rare_dtypes_travel() -> None:
    model = torch.nn.Linear(2, 1)
    found = lt.broadcast_object(model.state_dict())
    assert type(found) is OrderedDict
    model.load_state_dict(found)
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn, torch.complex64, torch.bfloat16):
        tensor = torch.tensor([1.0, -2.0]).to(dtype)
        found = lt.broadcast_object([tensor])[0]
        assert found.dtype == dtype
        assert torch.equal(found.to(torch.complex64), tensor.to(torch.complex64))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"at": [Point(1, 2)]}, r"the object\['at'\]\[0\] is a namedtuple Point"),
        ([torch.ones(2).to_sparse()], r"the object\[0\]: .*sparse"),
        ({"m": torch.ones(1, device="meta")}, r"the object\['m'\]: "),
        ([print], r"the object\[0\] is a builtin_function_or_method"),
    ],
)
def test_what_does_not_travel_is_refused_on_every_rank_with_its_place(value: Any, reason: str) -> None:
    for call in (lt.broadcast_object, lt.allgather_object):
        with pytest.raises(lt.ConfigurationError, match=f"on rank 0: {reason}"):
            call(value if lt.rank() == 0 else None)


def wrapped() -> Any:
    model = torch.nn.Linear(2, 1)
    return lt.SlowMo(torch.optim.SGD(model.parameters(), 0.1), model=model, period=2)


def test_extra_of_a_checkpoint_keeps_its_kinds(shared_path: Path) -> None:
    extra = {
        "order": OrderedDict(b=torch.tensor([1.0]).to(torch.float8_e5m2), a=(1, {2})),
        "counts": Counter("aab"),
        "lists": defaultdict(list, x=[Path("a"), b"raw"]),
        "z": torch.tensor([1 - 2j, 3j]),
        "scalar": torch.tensor(0.5).to(torch.float8_e4m3fn),
        3: None,
    }
    optimizer = wrapped()
    lt.save(shared_path / "run", optimizer, extra=extra)
    found = lt.load(shared_path / "run", optimizer)
    assert list(found) == list(extra)
    for key in ("counts", "lists", 3):
        assert type(found[key]) is type(extra[key])
        assert found[key] == extra[key]
    assert type(found["order"]) is OrderedDict
    assert found["order"]["a"] == (1, {2})
    for name, tensor in (("z", found["z"]), ("scalar", found["scalar"])):
        assert tensor.dtype == extra[name].dtype
        assert torch.equal(tensor.to(torch.complex64), extra[name].to(torch.complex64))
    assert found["order"]["b"].dtype == torch.float8_e5m2


def holding_itself() -> Any:
    value: dict[str, Any] = {}
    value["self"] = [value]
    return value


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"at": Point(1, 2)}, "extra.*at.* is a namedtuple Point"),
        (holding_itself(), r"extra\['self'\]\[0\] contains itself"),
        ({"m": torch.ones(1).to_sparse()}, r"extra\['m'\]: .*sparse"),
    ],
)
def test_extra_that_cannot_be_saved_is_refused_on_every_rank(extra: Any, reason: str, shared_path: Path) -> None:
    optimizer = wrapped()
    lt.save(shared_path / "run", optimizer, extra="before")
    with pytest.raises(lt.CheckpointError, match=reason):
        lt.save(shared_path / "run", optimizer, extra=extra if lt.rank() == 0 else None)
    assert lt.load(shared_path / "run", optimizer) == "before"
