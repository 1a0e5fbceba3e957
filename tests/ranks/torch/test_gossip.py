"""Gossip under PyTorch: the adapter's part."""

import copy
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.testing import assert_allclose
from torch import nn

import lentando.torch as lt
from lentando.comm.dtypes import numpy_dtype
from lentando.comm.topology import OnePeerExponential

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
BASES: dict[str, Any] = {
    "sgp": lt.SGP(),
    "sgp, static exponential": lt.SGP(lt.StaticExponential()),
    "osgp": lt.OSGP(deterministic=True),
    "osgp, three steps late": lt.OSGP(staleness=3, deterministic=True),
    "dpsgd": lt.DPSGD(),
    "sgp in bfloat16": lt.SGP(wire_dtype="bfloat16"),
    "osgp in float16": lt.OSGP(staleness=2, deterministic=True, wire_dtype="float16"),
}


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)).to(dtype)


def train(optimizer: lt.DistributedOptimizer, model: nn.Module, steps: int, first: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        images = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + lt.rank())).to(dtype)
        optimizer.zero_grad()
        loss = (model(images) - images.sum(dim=1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def wrap(model: nn.Module, base: Any, **options: Any) -> lt.DistributedOptimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return lt.DistributedOptimizer(sgd, model=model, base=base, **options)


@pytest.mark.parametrize("name", BASES)
def test_gossip_in_torch_equals_the_reference(name: str) -> None:
    model = nn.Linear(DIMENSION, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(START)[None])
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), base=BASES[name])
    for step in range(12):
        x = model.weight.detach().numpy()[0]
        model.weight.grad = torch.from_numpy(QUADRATIC(lt.rank(), step, x))[None]
        optimizer.step()
    graphs = BASES[name].topology.for_size(lt.size())
    staleness = getattr(BASES[name], "staleness", 0)
    wire_dtype = numpy_dtype(BASES[name].wire_dtype or "float64")
    expected = reference.push_sum_sgd(
        lt.size(), 12, START, QUADRATIC, graphs.mixing_matrix, 0.1, staleness, wire_dtype=wire_dtype
    )
    assert_allclose(model.weight.detach().numpy()[0], expected.z[lt.rank()], rtol=1e-10)


@pytest.mark.parametrize("name", BASES)
def test_replicas_stay_together_and_slowmo_makes_them_equal(name: str) -> None:
    model = net()
    optimizer = wrap(model, BASES[name], outer=lt.SlowMomentum(1.0, 0.5), period=6)
    train(optimizer, model, 5)
    distance = optimizer.consensus_distance()
    assert distance < 1
    assert distance > 0 or lt.size() <= 2  # two ranks that swap halves agree exactly
    train(optimizer, model, 1, first=5)
    assert optimizer.consensus_distance() < 1e-6
    for name_, value in model.state_dict().items():
        for other in lt.allgather_object(value.clone()):
            assert torch.equal(other, value), name_


@pytest.mark.parametrize("name", BASES)
def test_gossip_resumes_bit_for_bit_through_files(name: str, shared_path: Any) -> None:
    """O20 for gossip: x, w and what is in flight are part of the state."""
    model = net()
    optimizer = wrap(model, BASES[name], outer=lt.SlowMomentum(1.0, 0.5), period=4)
    for taken in range(7):
        saved = shared_path / f"{taken}-{lt.rank()}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        train(optimizer, model, 1, first=taken)
    for taken in range(7):
        state = torch.load(shared_path / f"{taken}-{lt.rank()}.pt", weights_only=True)
        resumed = net()
        again = wrap(resumed, BASES[name], outer=lt.SlowMomentum(1.0, 0.5), period=4)
        resumed.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        train(again, resumed, 7 - taken, first=taken)
        for key, value in model.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), f"{key}, resumed after step {taken}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gossip_of_other_dtypes_mixes_in_float32_at_least(dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = wrap(model, lt.OSGP(deterministic=True), period=5)
    train(optimizer, model, 10)
    assert all(torch.isfinite(parameter).all() and parameter.dtype == dtype for parameter in model.parameters())
    assert optimizer.consensus_distance() < 1e-12


@pytest.mark.parametrize("name", ["sgp, static exponential", "osgp"])
def test_staged_memory_gives_the_same_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, on a CPU. No GPU has been used here."""
    from lentando.torch import optimizer as module
    from lentando.torch.model import TorchModel

    direct, staged = net(), net()
    train(wrap(direct, BASES[name], period=4), direct, 7)
    monkeypatch.setattr(module, "TorchModel", lambda *arguments: TorchModel(*arguments, staged=True))
    train(wrap(staged, BASES[name], period=4), staged, 7)
    for key, value in direct.state_dict().items():
        assert torch.equal(value, staged.state_dict()[key]), key


def test_averaged_evaluates_the_mean_and_gossip_continues_as_if_nothing_was() -> None:
    model, twin = net(), net()
    one, other = (wrap(m, lt.SGP(lt.StaticExponential())) for m in (model, twin))
    train(one, model, 4)
    own = copy.deepcopy(model.state_dict())
    with one.averaged():
        for gathered in lt.allgather_object(model[0].weight.detach().clone()):
            assert torch.equal(gathered, model[0].weight)
    for key, value in model.state_dict().items():
        assert torch.equal(value, own[key])
    train(one, model, 4, first=4)
    train(other, twin, 8)
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])


def test_one_message_per_step_and_peer() -> None:
    model = net()
    optimizer = wrap(model, lt.SGP())
    train(optimizer, model, 10)
    peers = sum(
        len(OnePeerExponential().for_size(lt.size()).peers(lt.rank(), step).out_neighbors) for step in range(10)
    )
    assert optimizer.report()["messages"] == peers


def test_dpsgd_on_a_directed_star_is_refused() -> None:
    if lt.size() < 3:
        return
    matrix = np.eye(lt.size()) / 2
    matrix[0, 1:] = 0.5
    matrix[:, 0] = 1 / lt.size()
    with pytest.raises(lt.ConfigurationError, match="DPSGD needs doubly stochastic"):
        wrap(net(), lt.DPSGD(lt.FromMatrix(matrix)))


def test_graph_of_another_size_is_refused() -> None:
    with pytest.raises(lt.ConfigurationError, match="9"):
        wrap(net(), lt.SGP(lt.FromMatrix(np.full((9, 9), 1 / 9))))
