#!/usr/bin/env bash
# keras 3.15.1 with tensorflow-cpu 2.21.0, Python 3.11.
#
# Most would expect that a layer computes with its weights. Seen: a Normalization layer that has been adapted lists mean,
# variance and count among its weights, but computes with constants that adapt() has made of them. set_weights() and
# assignments to the variables change nothing, until the layer's finalize_state() is called. A library that makes the
# weights of several processes equal, by assigning one process's weights in the others, leaves models that still differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 tensorflow-cpu==2.21.0 2>/dev/null
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np

x = np.ones((1, 3), np.float32)
first, second = keras.layers.Normalization(), keras.layers.Normalization()
first.adapt(np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32))
second.adapt(5 + 2 * np.random.default_rng(1).normal(size=(64, 3)).astype(np.float32))
before = np.array(second(x))
second.set_weights(first.get_weights())
print("weights equal:", all(map(np.array_equal, first.get_weights(), second.get_weights())))
print("first:", np.array(first(x)), "second:", np.array(second(x)))
assert all(map(np.array_equal, first.get_weights(), second.get_weights()))
assert np.array_equal(second(x), before)
assert not np.allclose(first(x), second(x))
second.finalize_state()
print("second after finalize_state():", np.array(second(x)))
assert np.allclose(first(x), second(x))
PYTHON
