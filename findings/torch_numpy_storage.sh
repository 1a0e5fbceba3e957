#!/usr/bin/env bash
# torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# Most would expect that Tensor.numpy() leaves the tensor as it was, at least when the array is gone again. Seen: from then
# on, and for good, the tensor's storage cannot be resized: "Trying to resize storage that is not resizable". A library
# that looks at a tensor in this way (to send it, to save it) breaks code that later calls resize_(), set_() or a module
# that does, such as the observers of quantization-aware training. numpy.from_dlpack(tensor) shares the same memory and
# leaves the storage resizable.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch

tensor = torch.ones(3)
assert tensor.untyped_storage().resizable()
array = np.from_dlpack(tensor)
assert array.ctypes.data == tensor.data_ptr()
del array
assert tensor.untyped_storage().resizable()
tensor.numpy()
print("resizable after numpy():", tensor.untyped_storage().resizable())
assert not tensor.untyped_storage().resizable()
try:
    tensor.resize_(10)
except RuntimeError as error:
    print(error)
    assert "not resizable" in str(error)
else:
    raise SystemExit("resize_() worked")
PYTHON
