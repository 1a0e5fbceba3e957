"""The arguments of Horovod's ``DistributedOptimizer``."""

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 2)


def sgd(model: nn.Module, lr: float = 0.5) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def backward(model: nn.Module, rank: int | None = None) -> None:
    rank = lt.rank() if rank is None else rank
    model(torch.full((2, 3), 0.1 * (rank + 1))).sum().backward()


def mean_of_gradients() -> list[torch.Tensor]:
    """The mean over ranks of the gradients of ``linear()``, computed on this rank alone."""
    model = linear()
    for rank in range(lt.size()):
        backward(model, rank)
    return [parameter.grad / lt.size() for parameter in model.parameters() if parameter.grad is not None]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("options", "factor", "tolerance"),
    [
        ({}, 1, 1e-6),
        ({"op": lt.Sum}, lt.size(), 1e-6),
        ({"gradient_predivide_factor": 4.0}, 1, 1e-6),
        ({"compression": lt.Compression.fp16}, 1, 1e-3),
        ({"compression": lt.Compression.bf16}, 1, 1e-2),
        ({"compression": lt.Compression.fp16, "op": lt.Sum}, lt.size(), 1e-3),
        ({"groups": 2, "backward_passes_per_step": 3}, 1, 1e-6),
    ],
)
def test_gradients_are_combined(options: dict[str, Any], factor: float, tolerance: float) -> None:
    model = linear()
    optimizer = lt.DistributedOptimizer(sgd(model), model.named_parameters(), **options)
    backward(model)
    optimizer.synchronize()
    for found, expected in zip(gradients(model), mean_of_gradients(), strict=True):
        torch.testing.assert_close(found, expected * factor, rtol=tolerance, atol=1e-6)
    with optimizer.skip_synchronize():
        optimizer.step()


def test_arguments_may_be_positional() -> None:
    model = linear()
    optimizer = lt.DistributedOptimizer(
        sgd(model), model.named_parameters(), lt.Compression.none, 2, lt.Sum, 1.0, 0, None, False, lt.global_process_set
    )
    assert optimizer.backward_passes_per_step == 2
    optimizer.set_backward_passes_per_step(3)
    assert optimizer.backward_passes_per_step == 3
    assert set(optimizer._parameter_names.values()) == {"weight", "bias"}
    backward(model)
    optimizer.step()
    torch.testing.assert_close(gradients(model)[0], mean_of_gradients()[0] * lt.size())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": lt.Sum, "gradient_predivide_factor": 2.0}, "op=Sum"),
        ({"op": lt.Min}, "Average or Sum"),
        ({"op": lt.Sum, "base": lt.LocalSGD(), "period": 2}, "leave out base="),
        ({"compression": "fp16"}, "Compression.none"),
        ({"backward_passes_per_step": 0}, "backward_passes_per_step"),
        ({"groups": 0}, "groups"),
        ({"groups": [[1]]}, "must contain Tensors, got int"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(lt.ConfigurationError, match=message):
        lt.DistributedOptimizer(sgd(linear()), **options)


def test_a_parameter_in_two_groups_and_names_that_are_missing_are_refused() -> None:
    model = linear()
    with pytest.raises(lt.ConfigurationError, match="one group only"):
        lt.DistributedOptimizer(sgd(model), groups=[[model.weight], [model.weight]])
    with pytest.raises(lt.ConfigurationError, match="lacks parameters of the optimizer, by number: 1 of group 0"):
        lt.DistributedOptimizer(sgd(model), [("weight", model.weight)])
    with pytest.raises(lt.ConfigurationError, match="pairs of name and parameter"):
        lt.DistributedOptimizer(sgd(model), list(model.parameters()))  # type: ignore[arg-type]


def test_a_step_after_synchronize_warns_outside_of_the_block_if_the_program_is_horovods() -> None:
    for options, count in (({"named_parameters": True}, 1), ({"model": True}, 0)):
        model = linear()
        given = {"named_parameters": model.named_parameters()} if "named_parameters" in options else {"model": model}
        optimizer = lt.DistributedOptimizer(sgd(model), **given)  # type: ignore[arg-type]
        backward(model)
        optimizer.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert len([one for one in caught if "skip_synchronize" in str(one.message)]) == count


def test_optimizers_that_differ_until_they_are_broadcast_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = linear()
    caplog.set_level(logging.WARNING, logger="lentando")
    optimizer = lt.DistributedOptimizer(sgd(model, lr=0.1 * (lt.rank() + 1)), model.named_parameters())
    texts = [record.getMessage() for record in caplog.records if "broadcast_optimizer_state" in record.getMessage()]
    assert len(texts) == (lt.rank() == 0 and lt.size() > 1)
    lt.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(not gradient.any() for gradient in gradients(model))
    backward(model)
    optimizer.step()


def test_overlap_sends_after_the_last_backward_pass_of_a_step() -> None:
    model = linear()
    base = lt.AllReduce(overlap=True)
    optimizer = lt.DistributedOptimizer(sgd(model), backward_passes_per_step=2, base=base, model=model)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model)
        backward(model)
        optimizer.synchronize()
        for found, expected in zip(gradients(model), mean_of_gradients(), strict=True):
            torch.testing.assert_close(found, expected * 2)
        optimizer.step()
