"""What may not be done inside ``averaged()``, and what ``averaged()`` refuses to average, in PyTorch."""

import copy
import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

LOCAL_SGD = lt.LocalSGD()


def make(base: Any = LOCAL_SGD, **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, lt.SlowMo(sgd, model=model, base=base, period=3, **settings)


def backward(model: nn.Module, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * number + lt.rank())
    loss = model(torch.randn(4, 3, generator=generator, dtype=torch.float64)).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    optimizer.zero_grad()
    optimizer.step(loss=backward(model, number))


@pytest.mark.parametrize("base", [lt.LocalSGD(), lt.AllReduce(), lt.SGP()], ids=repr)
@pytest.mark.parametrize("way", ["step", "loss", "closure", "synchronize"])
def test_a_step_inside_averaged_is_an_error_and_changes_nothing(base: Any, way: str) -> None:
    results = []
    for tries in (False, True):
        model, optimizer = make(base)
        for number in range(2):
            step(model, optimizer, number)
        with optimizer.averaged():
            if tries and (way != "synchronize" or isinstance(base, lt.AllReduce)):
                average = copy.deepcopy(model.state_dict())
                loss = backward(model, 9)
                take = {
                    "step": optimizer.step,
                    "loss": partial(optimizer.step, loss=loss),
                    "closure": partial(optimizer.step, partial(backward, model, 9)),
                    "synchronize": optimizer.synchronize,
                }[way]
                with pytest.raises(lt.ConfigurationError, match="a step is not possible inside averaged\\(\\)"):
                    take()
                assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
        for number in range(2, 8):
            step(model, optimizer, number)
        results.append((model.weight.detach().clone(), optimizer.report()["inner_steps"]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == 8


def test_what_else_is_an_error_there(shared_path: Any) -> None:
    _, optimizer = make()
    lt.save(shared_path / "one", optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    with optimizer.averaged():
        with pytest.raises(lt.ConfigurationError, match="to load a state dict is not possible inside averaged"):
            optimizer.load_state_dict(state)
        with pytest.raises(lt.ConfigurationError, match="to save a checkpoint is not possible inside averaged"):
            lt.save(shared_path / "two", optimizer)
        with pytest.raises(lt.ConfigurationError, match="to load a checkpoint is not possible inside averaged"):
            lt.load(shared_path / "one", optimizer)
        with pytest.raises(lt.ConfigurationError, match="averaged\\(\\) is not possible inside averaged"):
            optimizer.averaged()
        with pytest.raises(lt.ConfigurationError, match="join is not possible inside averaged"), lt.join(optimizer):
            pass
        with pytest.raises(lt.ConfigurationError, match="consensus_distance\\(\\) is not possible"):
            optimizer.consensus_distance()
    assert not (shared_path / "two").exists()


@pytest.mark.parametrize("base", [lt.LocalSGD(), lt.SGP(lt.Ring())], ids=repr)
def test_average_of_parameters_that_are_not_finite_is_refused_on_every_rank(base: Any) -> None:
    model, optimizer = make(base)
    step(model, optimizer, 0)
    last = lt.size() - 1
    if lt.rank() == last:
        with torch.no_grad():
            model.bias.fill_(float("nan"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lt.NonFiniteError, match=f"rank {last}: 'bias' is not finite"), optimizer.averaged():
        pass
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True)


def test_average_leaves_out_what_is_not_finite_if_asked_to(caplog: pytest.LogCaptureFixture) -> None:
    if lt.size() == 1:
        return
    model, optimizer = make(on_nonfinite="skip")
    step(model, optimizer, 0)
    expected = torch.from_numpy(lt.allgather(model.weight.detach()).numpy()).reshape(lt.size(), 3)[:-1].mean(0)
    if lt.rank() == lt.size() - 1:
        with torch.no_grad():
            model.weight.fill_(float("inf"))
    with optimizer.averaged():
        torch.testing.assert_close(model.weight.detach()[0], expected)
    assert any(r.levelno == logging.WARNING for r in caplog.records) == (lt.rank() in (0, lt.size() - 1))
