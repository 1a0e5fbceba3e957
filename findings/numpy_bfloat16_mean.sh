#!/usr/bin/env bash
# numpy 2.4.6, ml_dtypes 0.6.0 (the bfloat16 of TensorFlow, JAX and Keras in NumPy), Python 3.11.
#
# Most would expect that the mean of 1000 ones is 1 in bfloat16, as it is in float16, for which NumPy adds in float32,
# and as PyTorch and TensorFlow have it. Seen: it is 0.256. NumPy rounds to bfloat16 after each addition, so that sums
# of ones stop at 256, where the next number is 258; and `mean` makes an exception for float16 alone. `np.linalg.norm`
# of the same ones is right. An average of losses or weights that a framework returned in bfloat16 needs
# `mean(dtype=np.float32)`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np

half, brain = np.ones(1000, np.float16), np.ones(1000, ml_dtypes.bfloat16)
print("float16: sum", half.sum(), "mean", half.mean())
print("bfloat16: sum", brain.sum(), "mean", brain.mean(), "with dtype=float32", brain.mean(dtype=np.float32))
print("bfloat16: norm squared", round(float(np.linalg.norm(brain)) ** 2, 3))
assert (half.sum(), half.mean()) == (1000, 1)
assert brain.sum() == 256
assert 0.25 < brain.mean() < 0.26
assert brain.mean(dtype=np.float32) == 1
assert abs(np.linalg.norm(brain) ** 2 - 1000) < 0.01
PYTHON
