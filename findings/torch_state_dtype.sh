#!/usr/bin/env bash
# torch 2.13.0 (CPU), transformers 5.24.0, Python 3.11.
#
# Most would expect that `optimizer.load_state_dict(optimizer.state_dict())` leaves an optimizer as it is. Seen: PyTorch
# converts all state but the key "step" to the dtype of its parameter. The Adafactor of Transformers keeps its moments
# in float32 where the model is in bfloat16; when they are loaded, they are rounded to bfloat16, and the next step
# converts the rounded ones to float32 again. Training that is resumed from a checkpoint then differs from training that
# was not interrupted, within a few steps, without an error or a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from transformers.optimization import Adafactor


def dtypes_of(state):
    return {value.dtype for value in state.values() if isinstance(value, torch.Tensor)}


def trained(loaded_after):
    """The weight after ten steps, the dtypes of its state once loaded, and at the end."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16).bfloat16()
    optimizer = Adafactor(layer.parameters(), lr=0.01, relative_step=False, scale_parameter=False, beta1=0.9)
    dtypes = set()
    for step in range(10):
        if step == loaded_after:
            optimizer.load_state_dict(optimizer.state_dict())
            dtypes = dtypes_of(optimizer.state[layer.weight])
        optimizer.zero_grad()
        layer(torch.randn(8, 16).bfloat16()).square().mean().backward()
        optimizer.step()
    return layer.weight, dtypes, dtypes_of(optimizer.state[layer.weight])


plain, _, kept = trained(None)
resumed, loaded, _ = trained(3)
different = int((plain != resumed).sum())
print("state:", kept, "after it was loaded:", loaded, "| weights that differ after 7 more steps:", different, "of 256")
assert kept == {torch.float32}
assert loaded == {torch.bfloat16}
assert different > 0
PYTHON
