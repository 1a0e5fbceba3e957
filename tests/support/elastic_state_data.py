"""What the programs that train with elastic states, and the formulas that they are compared with, have in common."""

from typing import Any

import numpy as np

STEPS, COMMIT, DEATH, RATE, MOMENTUM, PERIOD, SLOW = 20, 5, 13, 0.0625, 0.875, 4, 0.5
"""Of the program for PyTorch. The last four are those of Keras, too, which holds a learning rate in float32."""

EPOCHS, BATCHES, BATCHES_PER_COMMIT, DEATH_IN_FIT = 3, 6, 4, (1, 3)
"""Of ``fit``, with the epoch and the batch in which rank 1 dies: the last commit is then at the end of epoch 0."""

LOOP_STEPS, LOOP_COMMIT, LOOP_DEATH = 18, 6, 9
"""Of the loop, in which rank 0 dies: the last commit is then in the middle of a round."""

ROWS = 8


def batch(step: int, rank: int) -> np.ndarray[Any, Any]:
    """What a rank trains on in a step: rows of three numbers, whose sum is to be learned."""
    return np.random.default_rng(100 * step + rank).normal(size=(ROWS, 3))
