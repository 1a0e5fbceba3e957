"""Minimum and maximum with NaN, eagerly and in a graph."""

from typing import Any

import pytest
import tensorflow as tf

import lentando.tensorflow as lt


@pytest.mark.parametrize("dtype", [tf.float64, tf.float32, tf.bfloat16])
@pytest.mark.parametrize("op", [lt.Max, lt.Min])
def test_nan_of_one_rank_is_the_extreme_on_every_rank(op: Any, dtype: Any) -> None:
    own = tf.constant([float("nan") if lt.rank() == lt.size() - 1 else 1.0, float(lt.rank())], dtype)
    in_graph = tf.function(lambda tensor: lt.allreduce(tensor, op=op))
    for found in (lt.allreduce(own, op=op), in_graph(own)):
        assert bool(tf.math.is_nan(found[0]))
        assert float(found[1]) == (lt.size() - 1 if op is lt.Max else 0)
