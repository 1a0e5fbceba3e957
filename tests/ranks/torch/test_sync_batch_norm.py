"""``SyncBatchNorm`` is batch normalization of the concatenated batches of all ranks."""

import copy

import pytest
import torch
from torch import nn

import lentando.torch as lt


def batch_of(rank: int, shape: tuple[int, ...], *, even: bool = False) -> torch.Tensor:
    """The batch of a rank; batches differ in length unless they are ``even``."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3 if even else 2 + rank, 4, *shape, generator=generator, dtype=torch.float64) * (1 + rank) + rank


def whole(shape: tuple[int, ...]) -> tuple[torch.Tensor, slice]:
    """The batches of all ranks together, and where this rank's is."""
    batches = [batch_of(rank, shape) for rank in range(lt.size())]
    start = sum(map(len, batches[: lt.rank()]))
    return torch.cat(batches), slice(start, start + len(batches[lt.rank()]))


def randomized(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in layer.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
    return layer.double()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("affine", [True, False])
def test_forward_and_backward_are_those_of_the_whole_batch(
    shape: tuple[int, ...], momentum: float | None, affine: bool
) -> None:
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[len(shape)]
    reference = randomized(kind(4, momentum=momentum, affine=affine))
    layer = lt.SyncBatchNorm(4, momentum=momentum, affine=affine).double()
    layer.load_state_dict(reference.state_dict())
    inputs, own = whole(shape)
    weights = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for _ in range(2):
        all_inputs = inputs.clone().requires_grad_()
        own_inputs = inputs[own].clone().requires_grad_()
        expected, found = reference(all_inputs), layer(own_inputs)
        torch.testing.assert_close(found, expected[own])
        (expected * weights).sum().backward()
        (found * weights[own]).sum().backward()
        assert all_inputs.grad is not None
        assert own_inputs.grad is not None
        torch.testing.assert_close(own_inputs.grad, all_inputs.grad[own])
    for parameter, of_reference in zip(layer.parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(lt.allreduce(parameter.grad, op=lt.Sum), of_reference.grad)
    for found, expected in zip(layer.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.eval()(inputs[own]), reference.eval()(inputs)[own])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_of_short_floats_are_formed_in_float32(dtype: torch.dtype) -> None:
    layer = lt.SyncBatchNorm(4)
    inputs, own = whole((3,))
    found = layer(inputs[own].to(dtype))
    assert found.dtype is dtype
    expected = nn.BatchNorm1d(4)(inputs.to(dtype).float())[own]
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_without_running_statistics_evaluation_uses_the_batch() -> None:
    layer = lt.SyncBatchNorm(4, track_running_stats=False).double().eval()
    inputs, own = whole((2,))
    torch.testing.assert_close(layer(inputs[own]), nn.BatchNorm1d(4, track_running_stats=False).double()(inputs)[own])


def test_layers_of_a_model_are_converted_with_their_state() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm2d(2))))
    before = copy.deepcopy(model.state_dict())
    weight = model[1].weight
    converted = lt.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert [type(model[1]), type(model[2][0])] == [lt.SyncBatchNorm] * 2
    assert model[1].weight is weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_inputs_of_another_shape_are_refused() -> None:
    with pytest.raises(lt.ConfigurationError, match=r"\(N, 4, ...\), got \[2, 3\]"):
        lt.SyncBatchNorm(4)(torch.ones(2, 3))
    if lt.size() == 1:
        return
    with pytest.raises(lt.ConfigurationError, match="more than 1 value per channel"):
        lt.SyncBatchNorm(4)(torch.ones(int(lt.rank() == 0), 4))


@pytest.mark.skipif(lt.size() == 1, reason="one rank has no other set than that of all ranks")
def test_a_process_set_normalizes_its_own_batches() -> None:
    alone = lt.add_process_set([0])
    try:
        if lt.rank() == 0:
            layer = lt.SyncBatchNorm(4, process_set=alone).double()
            own = batch_of(0, (3,))
            torch.testing.assert_close(layer(own), nn.BatchNorm1d(4).double()(own))
    finally:
        lt.remove_process_set(alone)


@pytest.mark.filterwarnings("default")  # of torch's compiler, about itself
def test_compiled_layer_gives_the_same() -> None:
    """PyTorch compiles what is around it."""
    inputs = batch_of(lt.rank(), (5,))
    model = nn.Sequential(lt.SyncBatchNorm(4), nn.ReLU()).double()
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        found, expected = compiled(inputs), twin(inputs)
        assert torch.equal(found, expected)
    assert torch.equal(model[0].running_mean, twin[0].running_mean)
    torch.compiler.reset()
