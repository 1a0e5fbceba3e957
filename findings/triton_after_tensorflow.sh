#!/usr/bin/env bash
# tensorflow-cpu 2.21.0, triton 3.7.1 (which comes with torch 2.13.0, except with its build for CPUs), x86-64 Linux.
#
# Most would expect that PyTorch and TensorFlow can be imported in either order. Seen: "import triton" after "import
# tensorflow" is a segmentation fault, the other order works. Nobody has to write that: PyTorch imports triton when the
# first optimizer of torch.optim is made. TensorFlow's library makes its LLVM visible to all that are loaded later, and
# triton's then calls it in place of its own (https://github.com/tensorflow/tensorflow/issues/124205).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorflow-cpu==2.21.0 triton==3.7.1 2>/dev/null
export TF_CPP_MIN_LOG_LEVEL=3
"$folder/venv/bin/python" -c 'import triton, tensorflow'
echo "triton, then tensorflow: works"
status=0
"$folder/venv/bin/python" -c 'import tensorflow, triton' || status=$?
echo "tensorflow, then triton: status $status"
test "$status" = 139
