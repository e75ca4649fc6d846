# What people do here. Every target but test-gpu sets up what it needs in .venv, from nothing.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
WORKERS ?= 6
REPLICA_PYTHON ?= python3.12

QUARTER := --width 0.25 --batch-size 128 --schedule onecycle --optimizer sgd --momentum 0.9 --nesterov \
	--weight-decay 0.005 --label-smoothing 0.1 --lr 0.2 --epochs 1

# Open MPI refuses root and more ranks than cores unless told otherwise.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export PRTE_MCA_hwloc_default_binding_policy := none

.PHONY: help demo demo-kill test test-quick test-gpu lint bench soak ranks cudnn-plans gpu-kit replica wheel clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -e '.[mpi]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install -q -e '.[mpi,report,dev]' '$(TORCH)'
	$(BIN)/pip install -q --no-deps 'nvidia-cudnn-frontend>=1.32'  # its names are checked; what it needs to run is large
	@touch $@

demo: $(VENV)/.run  ## train on two ranks to 99 % test accuracy, in seconds
	PATH=$(CURDIR)/$(BIN):$$PATH mpirun -n 2 python -m distrib.train --recipe demo

demo-kill: $(VENV)/.run  ## the demo on four ranks, two of which are killed: it ends with the same bits
	$(BIN)/python -m launch.demo_kill

test: lint  ## every test that needs no GPU; the last lines say what was not run, and what it needs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-quick: $(VENV)/.dev  ## the tests that start no other process: a minute at most
	$(BIN)/python -m pytest -x -m "quick and not needs"

test-gpu:  ## every test and benchmark that needs a GPU, into gpu-report.json; PYTHON as docs/gpu.md sets it up
	@$(PYTHON) -c 'import sys; sys.excepthook = lambda *found: print("make test-gpu: give a Python with this", \
		"package as PYTHON=, as docs/gpu.md sets it up:", found[1], file=sys.stderr); import launch.cli'
	PATH=$(abspath $(dir $(shell command -v $(PYTHON)))):$$PATH $(PYTHON) -m launch.cli gpu-report $(ONLY:%=--only %)

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: export PATH := $(CURDIR)/$(BIN):$(PATH)
bench: $(VENV)/.dev  ## docs/benchmarks.md's table, against PyTorch on two cores: half an hour
	mpirun -n 2 distrib bench step --against torch
	OMP_NUM_THREADS=2 distrib bench step --against torch
	mpirun -n 2 distrib bench step --batch-size 8 --against torch
	OMP_NUM_THREADS=2 distrib bench step --batch-size 500 --evaluate --against torch
	OMP_NUM_THREADS=2 distrib bench step --batch-size 256 --repeats 3 --against torch
	mpirun -n 2 distrib bench step --batch-size 64 --width 0.125 --repeats 9 --against torch
	OMP_NUM_THREADS=2 distrib bench step --batch-size 8 --steps 1 --repeats 2 --against loop
	OMP_NUM_THREADS=1 distrib bench ops --batch-size 32 --against torch
	OMP_NUM_THREADS=1 distrib bench ops --batch-size 32 --width 0.125 --against torch
	mpirun -n 2 distrib bench allreduce
	distrib bench run --recipe demo --shift 0 --repeats 5 --against torch
	distrib bench run $(QUARTER) --repeats 2 --against torch

soak: export PATH := $(CURDIR)/$(BIN):$(PATH)
soak: $(VENV)/.dev  ## a campaign of 370 faults, kills and suspensions, also on Slurm: two hours
	FAULT_ROUNDS=4 KILL_ROUNDS=50 SUSPEND_ROUNDS=4 python -m pytest -s tests/cluster/test_hosts.py \
		$(addprefix tests/distrib/test_,failures.py kill.py suspend.py output.py)
	ELASTIC_ROUNDS=200 python -m pytest -s tests/distrib/test_elastic.py
	STRANGE_ROUNDS=200 python -m pytest tests/distrib/test_entry.py -k strangers
	DISTRIB_SOAK=1 python -m pytest tests/cluster/test_slurm.py

ranks: export PATH := $(CURDIR)/$(BIN):$(PATH)
ranks: $(VENV)/.run  ## the same bits on 1 to 8 ranks, for 80 combinations of options: 40 minutes; goes on where it was
	PYTHONPATH=. python tests/any_ranks.py

cudnn-plans:  ## the plans that the real cuDNN (366 MB) builds for a described H100, without a GPU
	$(PYTHON) -m venv .venv-cudnn
	.venv-cudnn/bin/pip install -q numpy cuda-pathfinder nvidia-cudnn-cu12==9.19.0.56 nvidia-cudnn-frontend==1.32.0 \
		nvidia-cuda-runtime-cu12
	@mkdir -p results/gpu
	PYTHONPATH=. .venv-cudnn/bin/python tests/cudnn_plans.py > results/gpu/cudnn-plans.md
	@cat results/gpu/cudnn-plans.md

gpu-kit:  ## a folder with all that a GPU machine without a network lacks; its first.sh measures there
	$(PYTHON) tests/gpu/kit.py gpu-kit

replica: gpu-kit  ## the GPU path's tests that need no GPU, on the software of the first GPU machine: 5 GB
	$(REPLICA_PYTHON) -m venv .venv-replica
	.venv-replica/bin/pip install -q -r tests/gpu/replica.txt
	PYTHON=.venv-replica/bin/python gpu-kit/first.sh --run python tests/gpu/replica.py $(CURDIR)/results/gpu/replica.md

wheel: $(VENV)/.dev  ## a wheel in dist/
	$(BIN)/python -m build --wheel

clean:  ## remove what the targets made, runs/ apart
	rm -rf $(VENV) .venv-cudnn .venv-replica gpu-kit gpu-results build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
