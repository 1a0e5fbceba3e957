#!/usr/bin/env bash
# torch 2.13.0 (CPU), Python 3.11.
#
# The learning rate of PyTorch's optimizers may be a tensor, so that compiled steps are not compiled again when it
# changes. Most would expect that parameter groups have a learning rate each, as they have if it is a float. Seen:
# groups that do not name one share the tensor, and schedulers write into it, so that all groups get the rate of the
# last one. With a LambdaLR that is meant to train the first layer at 0.1 and to keep the second at 0, both have 0, and
# with the groups in the other order both have 0.1, without an error or a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch


def rates(rate, factors):
    """The learning rates of two groups under a schedule with one constant factor for each."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in factors]
    optimizer = torch.optim.SGD(groups, lr=rate)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch, factor=factor: factor for factor in factors])
    return [round(float(group["lr"]), 3) for group in optimizer.param_groups]


for factors in ([1.0, 0.0], [0.0, 1.0]):
    number, tensor = rates(0.1, factors), rates(torch.tensor(0.1), factors)
    print("factors", factors, "float:", number, "tensor:", tensor)
    assert number == [0.1 * factor for factor in factors]
    assert tensor == [0.1 * factors[-1]] * 2
PYTHON
