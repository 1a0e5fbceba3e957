#!/usr/bin/env bash
# keras 3.15.1 with tensorflow-cpu 2.21.0, Python 3.11.
#
# Most would expect that a gradient that comes as IndexedSlices (an Embedding's does) trains like the same gradient made
# dense. Seen: where a row occurs twice in a batch, Keras's Adam adds the squares of both parts to its second moment, and
# not the square of their sum: 0.001 * (1 + 1) = 0.002 in place of 0.001 * 2 ** 2 = 0.004. An averaging optimizer that
# makes gradients dense first therefore trains other weights than the same optimizer without it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 tensorflow-cpu==2.21.0 2>/dev/null
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np
import tensorflow as tf


def second_moment(dense: bool) -> float:
    """Of row 0 after one step along a gradient of 1 that comes twice in the batch."""
    variable = keras.Variable(np.ones((3, 1), np.float32))
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build([variable])
    gradient = tf.IndexedSlices(tf.ones((2, 1)), [0, 0], [3, 1])
    optimizer.apply([tf.convert_to_tensor(gradient) if dense else gradient], [variable])
    return float(next(v for v in optimizer.variables if "velocity" in v.path)[0, 0])


sparse, dense = second_moment(False), second_moment(True)
print(f"second moment: sparse {sparse:.4f}, dense {dense:.4f}")
assert abs(sparse - 0.002) < 1e-6
assert abs(dense - 0.004) < 1e-6
PYTHON
