"""Training that resumes from `state_dict` is bit-identical (O20, O21)."""

import copy
from typing import Any

import pytest
import torch
from torch_training import assert_same_model, make, net, sgd, train

import lentando.torch as lt
from lentando.comm.transport import Transport


@pytest.mark.parametrize("kind", ["slowmo", "slowmo, adam", "localsgd", "allreduce"])
def test_resumed_training_is_the_same_bit_identically(kind: str, shared_path: Any) -> None:
    """O20, at every step of two rounds, through files and in a model that was built again."""
    model = net()
    optimizer = make(kind, model)
    for taken in range(9):
        saved = shared_path / f"{kind}-{taken}-{lt.rank()}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        train(optimizer, model, 1, first=taken)
    train(optimizer, model, 4, first=9)
    for taken in range(9):
        state = torch.load(shared_path / f"{kind}-{taken}-{lt.rank()}.pt", weights_only=True)
        resumed = net(seed=5 + lt.rank())
        again = make(kind, resumed)
        resumed.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        train(again, resumed, 13 - taken, first=taken)
        assert_same_model(model, resumed, f"resumed after step {taken}")
        assert again.rounds == optimizer.rounds


def test_order_of_constructing_and_loading_does_not_matter() -> None:
    """O21."""
    model = net()
    optimizer = make("slowmo", model)
    train(optimizer, model, 6)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(optimizer, model, 6, first=6)

    loaded_first = net(seed=1)
    loaded_first.load_state_dict(weights)
    one = make("slowmo", loaded_first)  # takes over rank 0's parameters ...
    loaded_first.load_state_dict(weights)  # ... which in the middle of a round are not this rank's
    one.load_state_dict(copy.deepcopy(state))  # torch's optimizers keep the tensors that they are given
    built_first = net(seed=2)
    other = make("slowmo", built_first)
    other.load_state_dict(copy.deepcopy(state))
    built_first.load_state_dict(weights)
    for resumed, again in ((loaded_first, one), (built_first, other)):
        train(again, resumed, 6, first=6)
        assert_same_model(model, resumed)


def test_state_of_another_rank_is_refused(transport: Transport) -> None:
    if lt.size() == 1:
        return
    model = net()
    optimizer = make("slowmo", model)
    train(optimizer, model, 5)
    states = lt.allgather_object(optimizer.state_dict()["lentando"])
    wrong = {**optimizer.state_dict(), "lentando": states[(lt.rank() + 1) % lt.size()]}
    with pytest.raises(lt.ConfigurationError, match=f"the rank .*is {lt.rank()} here"):
        optimizer.load_state_dict(wrong)


@pytest.mark.parametrize("saved_by", ["rank 0 of a larger job", "a plain optimizer"])
def test_any_state_will_do_where_gradients_are_averaged(saved_by: str) -> None:
    """As when rank 0 saves, and all ranks load: a program of Horovod does so after it has wrapped the optimizer."""
    model = net()
    optimizer = make("allreduce", model)
    train(optimizer, model, 3)
    weights, state = copy.deepcopy(model.state_dict()), lt.broadcast_object(optimizer.state_dict())
    if saved_by == "a plain optimizer":
        del state["lentando"]
    else:
        state["lentando"]["size"] += 1
    train(optimizer, model, 3, first=3)
    resumed = net(seed=1)
    again = make("allreduce", resumed)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(again, resumed, 3, first=3)
    assert_same_model(model, resumed)
    assert again.report()["inner_steps"] == (3 if saved_by == "a plain optimizer" else 6)


def test_state_that_one_rank_has_loaded_is_broadcast_with_its_counts() -> None:
    """The loop of Horovod's example: rank 0 restores the checkpoint, and broadcasts it."""
    model = net()
    optimizer = make("allreduce", model)
    train(optimizer, model, 3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(optimizer, model, 3, first=3)
    resumed, root = net(seed=1), lt.size() - 1
    again = make("allreduce", resumed)
    if lt.rank() == root:
        resumed.load_state_dict(weights)
        again.load_state_dict(state)
    lt.broadcast_parameters(resumed.state_dict(), root_rank=root)
    lt.broadcast_optimizer_state(again, root_rank=root)
    train(again, resumed, 3, first=3)
    assert_same_model(model, resumed, but="running")  # statistics of a batch, which is the rank's own
    assert again.report()["inner_steps"] == 6


def test_state_that_some_ranks_have_loaded_is_an_error_that_says_what_to_do() -> None:
    model, other = net(), net()
    optimizer, again = make("allreduce", model), make("allreduce", other)
    train(optimizer, model, 1)
    if lt.rank() == 0:
        again.load_state_dict(optimizer.state_dict())
    if lt.size() == 1:
        return
    with pytest.raises(lt.MismatchError, match="others continue: .* broadcast it afterwards"):
        train(again, other, 1)


def test_state_of_another_method_or_of_a_plain_optimizer_is_refused() -> None:
    model = net()
    state = make("slowmo", model).state_dict()
    with pytest.raises(lt.ConfigurationError, match="other settings than those here: outer was SlowMomentum"):
        make("localsgd", net()).load_state_dict(state)
    with pytest.raises(lt.ConfigurationError, match="no entry 'lentando'"):
        make("slowmo", net()).load_state_dict(sgd(model).state_dict())
