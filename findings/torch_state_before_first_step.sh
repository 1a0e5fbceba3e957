#!/usr/bin/env bash
# torch 2.13.0 (CPU), Python 3.11.
#
# Most would expect that `get_optimizer_state_dict` (and `get_state_dict`) of torch.distributed.checkpoint only read the
# optimizer. Seen: if it has no state yet, and no parameter a gradient, they take a step with gradients of zeros and
# learning rate 0. A checkpoint before the first step thereby changes the training: Adam counts that step, so that its
# first steps are smaller; and Rprop takes its step sizes from the learning rate of its first step, which is 0 now, so
# that the model all but stays where it is for some fifty steps. Adagrad, which has its state from the start, is not
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def change(name: str, has_read: bool) -> float:
    """How far five steps of learning rate 0.01 move a weight that starts at 1."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    if has_read:
        get_optimizer_state_dict(model, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).square().sum().backward()
        optimizer.step()
    return 1 - model.weight.item()


ratios = {name: change(name, True) / change(name, False) for name in ("Adagrad", "Adam", "Rprop")}
print("change of the weight, if the state was read first, relative to without:", ratios)
assert ratios["Adagrad"] == 1
assert 0.8 < ratios["Adam"] < 0.95
assert ratios["Rprop"] < 0.01
PYTHON
