"""The mean of the ranks' losses, as control messages carry them."""

import math

import numpy as np
import pytest

from lentando.optimizers.rules.non_finite import loss_to_send, mean_loss


def test_loss_is_the_mean_over_the_ranks_that_have_one() -> None:
    assert mean_loss(np.array([1.0, math.nan, 4.0])) == 2.5


def test_loss_is_nan_when_no_rank_has_one() -> None:
    assert math.isnan(mean_loss(np.array([math.nan, math.nan])))


def test_infinite_loss_of_one_rank_is_not_hidden() -> None:
    assert mean_loss(np.array([math.inf, 1.0])) == math.inf


@pytest.mark.parametrize(("loss", "sent"), [(None, math.nan), (math.nan, math.inf), (math.inf, math.inf), (2.5, 2.5)])
def test_no_loss_is_sent_as_nan_and_nan_as_infinity(loss: float | None, sent: float) -> None:
    np.testing.assert_equal(loss_to_send(loss), sent)
