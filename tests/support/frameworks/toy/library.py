"""The "framework" of this adapter: parameters are NumPy arrays, which a step of SGD replaces by others."""

import numpy as np

from lentando.comm.transport import Array


class SGD:
    """SGD with heavy-ball momentum.

    Attributes:
        parameters: the model, arrays by name.
        momenta: momentum of each parameter by name.
        lr, momentum: hyperparameters.
    """

    def __init__(self, parameters: dict[str, Array], lr: float, momentum: float = 0.0) -> None:
        self.parameters = parameters
        self.momenta = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.lr = lr
        self.momentum = momentum

    def step(self, gradients: dict[str, Array | None]) -> None:
        """Replace the parameters that have a gradient."""
        for name, gradient in gradients.items():
            if gradient is not None:
                self.momenta[name] = self.momentum * self.momenta[name] + gradient
                self.parameters[name] = self.parameters[name] - self.lr * self.momenta[name]
