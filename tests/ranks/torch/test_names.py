"""Names are compared: ranks that list the same tensors in another order never exchange values silently."""

import threading
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

NAMES = ["accuracy", "loss", "speed"]


def in_own_order() -> list[str]:
    """Rank 0 begins with the first name, rank 1 with the second, and so on."""
    start = lt.rank() % len(NAMES)
    return NAMES[start:] + NAMES[:start]


@pytest.mark.parametrize(
    "call",
    [
        lambda name: lt.allreduce(torch.tensor(1.0), name=name),
        lambda name: lt.allreduce_(torch.ones(3, dtype=torch.float64), name=name, op=lt.Max),
        lambda name: lt.allgather(torch.ones(2, 2), name=name),
        lambda name: lt.broadcast(torch.ones(2), 0, name=name),
        lambda name: lt.broadcast_object({"a": 1}, 0, name=name),
        lambda name: lt.allgather_object(1, name=name),
    ],
)
def test_calls_by_other_names_are_an_error_on_every_rank(call: Any) -> None:
    if lt.size() == 1:
        return
    with pytest.raises(lt.MismatchError, match=r"rank 0: .* named 'accuracy'.*rank 1: .* named 'loss'"):
        call(in_own_order()[0])
    call("the same")


def test_a_name_on_one_rank_alone_is_an_error() -> None:
    if lt.size() == 1:
        return
    with pytest.raises(lt.MismatchError, match="named 'mine'"):
        lt.allreduce(torch.ones(1), name="mine" if lt.rank() == 0 else None)


@pytest.mark.parametrize("as_pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_parameters_in_another_order_take_over_the_root_s_of_their_name(as_pairs: bool, dtype: torch.dtype) -> None:
    root = lt.size() - 1
    values = {name: number + 1 for number, name in enumerate(NAMES)}
    state = {name: torch.tensor([values[name] if lt.rank() == root else 0]).to(dtype) for name in in_own_order()}
    lt.broadcast_parameters(list(state.items()) if as_pairs else state, root)
    assert {name: int(tensor) for name, tensor in state.items()} == values


def test_several_tensors_of_one_name_are_all_sent() -> None:
    pairs = [("w", torch.tensor([float(number) if lt.rank() == 0 else -1.0])) for number in range(3)]
    lt.broadcast_parameters(pairs, 0)
    assert [tensor.item() for _, tensor in pairs] == [0.0, 1.0, 2.0]


def test_parameters_that_differ_are_an_error_that_says_what_each_rank_lacks() -> None:
    if lt.size() == 1:
        return
    is_first = lt.rank() == 0
    state = {"shared": torch.ones(2), "head.a" if is_first else "head.b": torch.ones(1)}
    with pytest.raises(lt.MismatchError, match=r"broadcast_parameters: .*'head.b' not on rank 0.*'head.a' not on rank"):
        lt.broadcast_parameters(state, 0)
    state = {"shared": torch.ones(2 + is_first, dtype=torch.float64)}
    with pytest.raises(lt.MismatchError, match=r"'shared' is rank 0: float64 \[3\]; rank"):
        lt.broadcast_parameters(state, 0)
    assert (state["shared"] == 1).all()


def test_two_threads_never_get_each_others_sums() -> None:
    """Whichever order the threads come in, on each rank: right sums or an error, and no hang."""
    wrong: list[float] = []

    def reduce(k: int) -> None:
        try:
            for _ in range(20):
                total = lt.allreduce(torch.tensor(float(k)), op=lt.Sum, name=f"thread {k}").item()
                if total != lt.size() * k:
                    wrong.append(total)
        except lt.MismatchError:
            return

    threads = [threading.Thread(target=reduce, args=(k,), daemon=True) for k in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_an_optimizer_in_one_thread_and_collectives_in_another_never_mix() -> None:
    model = torch.nn.Linear(300, 100)
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model=model)
    outcomes: dict[str, list[float] | None] = {}

    def train() -> None:
        for _ in range(10):
            optimizer.zero_grad()
            (model(torch.ones(1, 300)).sum() * (lt.rank() + 1)).backward()
            optimizer.step()
        outcomes["gradients"] = model.bias.grad.unique().tolist()  # type: ignore[union-attr]

    def reduce() -> None:
        outcomes["sums"] = [lt.allreduce(lt.rank() + 1, op=lt.Sum, name="next to") for _ in range(20)]

    def until_mismatch(function: Any) -> None:
        try:
            function()
        except lt.MismatchError:
            return

    threads = [threading.Thread(target=until_mismatch, args=(each,), daemon=True) for each in (train, reduce)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not any(thread.is_alive() for thread in threads)
    assert outcomes.get("gradients", [(lt.size() + 1) / 2]) == [(lt.size() + 1) / 2]
    assert set(outcomes.get("sums", [])) <= {lt.size() * (lt.size() + 1) / 2}  # type: ignore[arg-type]


@pytest.mark.parametrize("are_named", [False, True])
def test_states_of_optimizers_that_list_their_parameters_in_another_order_are_refused(are_named: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) if are_named else nn.Linear(3, 2)
    given: list[Any] = list(model.named_parameters() if are_named else model.parameters())
    other = given[2:] + given[:2] if are_named else given[::-1]  # names or shapes report them apart
    optimizer = torch.optim.Adam(given if lt.rank() == 0 else other, lr=0.1)
    model(torch.ones(1, 2 if are_named else 3)).sum().backward()
    optimizer.step()
    if lt.size() == 1:
        lt.broadcast_optimizer_state(optimizer, 0)
        return
    with pytest.raises(lt.MismatchError, match=r"broadcast_optimizer_state: the ranks' tensors differ: 'parameter 0"):
        lt.broadcast_optimizer_state(optimizer, 0)
