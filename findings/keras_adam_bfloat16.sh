#!/usr/bin/env bash
# keras 3.15.1 with tensorflow-cpu 2.21.0, Python 3.11.
#
# Most would expect that an optimizer of Keras trains a bfloat16 variable as it trains a float32 one, only more coarsely.
# Seen: after 5 steps of learning rate 0.1 along a gradient of 1, a variable that began at 1 is
#
#                float32   bfloat16
#     Adam       0.500     1.0       (AdamW and Lamb likewise: it never moves)
#     Nadam      0.604     nan
#     SGD        0.500     0.494     (RMSprop, Adamax, Lion, Adagrad, Ftrl, Adafactor likewise: as expected)
#
# The optimizer computes its bias correction in the variable's dtype, where beta_2 = 0.999 rounds to 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 tensorflow-cpu==2.21.0 2>/dev/null
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PYTHON'
import math

import keras
import numpy as np


def trained(name: str, dtype: str) -> float:
    variable = keras.Variable(np.ones(3, np.float32), dtype=dtype)
    optimizer = getattr(keras.optimizers, name)(0.1)
    optimizer.build([variable])
    for _ in range(5):
        optimizer.apply([keras.ops.ones(3, dtype)], [variable])
    return float(variable[0])


for name in ("Adam", "AdamW", "Lamb"):
    full, half = trained(name, "float32"), trained(name, "bfloat16")
    print(f"{name}: float32 {full:.3f}, bfloat16 {half}")
    assert full < 0.6 and half == 1.0, name
full, half = trained("Nadam", "float32"), trained("Nadam", "bfloat16")
print(f"Nadam: float32 {full:.3f}, bfloat16 {half}")
assert full < 0.7 and math.isnan(half)
for name in ("SGD", "RMSprop", "Adamax", "Lion", "Adagrad", "Ftrl", "Adafactor"):
    full, half = trained(name, "float32"), trained(name, "bfloat16")
    print(f"{name}: float32 {full:.3f}, bfloat16 {half:.3f}")
    assert abs(full - half) < 0.02, name
PYTHON
