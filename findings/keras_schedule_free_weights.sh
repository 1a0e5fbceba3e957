#!/usr/bin/env bash
# keras 3.15.1 with tensorflow-cpu 2.21.0, Python 3.11.
#
# Most would expect that a step begins at the weights that the model has. Seen: ScheduleFreeAdamW copies the weights when
# it is built, and the first step computes the new weights from those copies. Weights that are set in between (a
# checkpoint that is loaded, the weights of another process) are undone by the first step; Adam steps from them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 tensorflow-cpu==2.21.0 2>/dev/null
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np


def after_one_step(name: str) -> float:
    """Built at 1, set to 100, then one step of learning rate 0.01."""
    variable = keras.Variable(np.ones(3, np.float32))
    optimizer = getattr(keras.optimizers, name)(0.01)
    optimizer.build([variable])
    variable.assign(np.full(3, 100, np.float32))
    optimizer.apply([keras.ops.ones(3)], [variable])
    return float(variable[0])


adam, schedule_free = after_one_step("AdamW"), after_one_step("ScheduleFreeAdamW")
print(f"AdamW: {adam:.2f}; ScheduleFreeAdamW: {schedule_free:.2f}")
assert adam > 99
assert schedule_free < 50
PYTHON
