"""All ranks start from the model of rank 0 (O25)."""

import torch
from torch_training import assert_same_model, batches, net, sgd

import lentando.torch as lt


def test_workers_that_start_differently_are_made_equal() -> None:
    """O25: parameters, frozen ones and buffers of either kind; to rank 0's."""
    model = net(seed=lt.rank())
    with torch.no_grad():
        model.norm.running_mean += lt.rank()
        model.norm.num_batches_tracked += lt.rank()
    reference_model = net(seed=0)
    lt.SlowMo(sgd(model), model=model)
    assert_same_model(model, reference_model)


def test_wrapping_changes_no_value_on_rank_0() -> None:
    model, twin = net(), net()
    images, _ = next(batches(1))
    lt.SlowMo(sgd(model), model=model)
    assert torch.equal(model(images), twin(images))
