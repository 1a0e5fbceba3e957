"""The mean of the replicas, evaluated by `averaged()`."""

import copy

import torch
from torch_training import assert_equal_on_all_ranks, everyones, make, net, train


def test_averaged_evaluates_the_mean_model_and_restores_the_own() -> None:
    model = net()
    optimizer = make("slowmo", model)
    train(optimizer, model, 6)
    own = copy.deepcopy(model.state_dict())
    weights = everyones(model.out.weight)
    with optimizer.averaged():
        assert torch.allclose(model.out.weight, torch.stack(weights).mean(dim=0), atol=1e-6)
        assert_equal_on_all_ranks(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name]), name
    train(optimizer, model, 4, first=6)
