#!/usr/bin/env bash
# keras 3.15.1 with tensorflow-cpu 2.21.0, Python 3.11.
#
# Most would expect that a compiled model that is saved as .h5 and loaded again can be trained further. Seen: Keras builds
# the loaded optimizer for no variables, so that its momentum is lost (with a warning) and the first step of fit raises
# "Unknown variable". And saving as .h5 takes the optimizer out of the compile config of the model that was saved: the
# same model, saved as .keras afterwards, is loaded with an RMSprop in place of its SGD.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 tensorflow-cpu==2.21.0 2>/dev/null
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import warnings

import keras
import numpy as np

warnings.simplefilter("ignore")
x, y = np.ones((4, 3)), np.ones((4, 2))
model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
model.compile(keras.optimizers.SGD(0.1, momentum=0.5), keras.losses.MeanSquaredError())
model.fit(x, y, verbose=0)
before = sorted(model.get_compile_config())
model.save(f"{sys.argv[1]}/model.h5")
loaded = keras.saving.load_model(f"{sys.argv[1]}/model.h5")
print("variables of the optimizer: saved", len(model.optimizer.variables), "loaded", len(loaded.optimizer.variables))
assert (len(model.optimizer.variables), len(loaded.optimizer.variables)) == (4, 2)
try:
    loaded.fit(x, y, verbose=0)
except ValueError as error:
    print("fit:", str(error).splitlines()[0][:60])
    assert "Unknown variable" in str(error)
else:
    raise AssertionError("fit works")
print("compile config: 'optimizer' in it before", "optimizer" in before, "after", "optimizer" in model.get_compile_config())
assert "optimizer" in before
assert "optimizer" not in model.get_compile_config()
model.save(f"{sys.argv[1]}/model.keras")
again = keras.saving.load_model(f"{sys.argv[1]}/model.keras")
print("optimizer of the .keras file:", type(again.optimizer).__name__)
assert isinstance(again.optimizer, keras.optimizers.RMSprop)
PYTHON
