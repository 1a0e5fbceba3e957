"""The flat memory of gradients, on one process."""

from collections.abc import Collection

import pytest
import torch
from torch import nn

from lentando.torch.flat_gradients import TorchGradients
from lentando.torch.model import TorchModel


class Mixed(nn.Module):
    """Parameters of two dtypes, one of which is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(2, 3), torch.zeros(4), torch.zeros(3, dtype=torch.complex64)])
        self.more = nn.ParameterList([torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)])


def gathered(gradients: TorchGradients, model: nn.Module, missing: Collection[int], value: float) -> None:
    """Gradients of this value, none for the parameters of these numbers, as the flat memory has them."""
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = None if number in missing else torch.full_like(parameter, value)
    gradients.gather()


@pytest.mark.parametrize("missing", [[], [1], [0, 4], [2], [0, 1, 2, 3, 4]])
def test_gradients_that_exist_are_copied_together(missing: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixed()
    gradients = TorchModel(torch.optim.SGD(model.parameters(), lr=0.1), model).flat_gradients
    gathered(gradients, model, [], 7.0)
    monkeypatch.delattr(TorchGradients, "copy")  # which copies one gradient
    gathered(gradients, model, missing, 3.0)
    taken = gradients.taken()
    for number, (name, _) in enumerate(model.named_parameters()):
        assert (gradients.views[name] == (0 if number in missing else 3)).all()
        assert (taken[name] is None) == (number in missing)


def test_a_gradient_in_the_place_of_one_that_is_missing_is_copied() -> None:
    model = nn.ParameterList([torch.zeros(2), torch.zeros(2), torch.zeros(2)])
    gradients = TorchModel(torch.optim.SGD(model.parameters(), lr=0.1), model).flat_gradients
    gathered(gradients, model, [], 7.0)
    gradients.scatter()
    model[1].grad, model[0].grad = model[0].grad, None
    model[2].grad = torch.full((2,), 3.0)
    gradients.gather()
    assert [view.tolist() for view in gradients.views.values()] == [[0, 0], [7, 7], [3, 3]]
