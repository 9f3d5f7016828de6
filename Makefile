# From a bare machine to pictures: `make demo`. The virtual environment is set up on the way, and only once.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

# Container images like to set this. What is imported here is compiled once and kept: Ray starts dozens of processes.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
ORACLES := .venv-oracles
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# torch without CUDA: 0.2 GB instead of 2.5 GB. Used where no GPU answers.
TORCH_CPU ?= https://download.pytorch.org/whl/cpu/torch/

# As many processes as cores, each with one thread.
SIDE_BY_SIDE = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --durations 10

help:  ## list the targets
	@awk -F ':.*##  ?' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo  ## prepare, train, evaluate and draw, on the embedded pictures: runs/demo
	@$(BIN)/layered demo

test: $(VENV)/.dev  ## what a machine without GPU can test in minutes
	@$(SIDE_BY_SIDE) -m "not slow and not soak and not gpu and not browser and not compile"
	$(SIDE_BY_SIDE) -m "compile and not gpu" --no-shape-checks

slow: $(VENV)/.dev  ## the long tests: whole stages interrupted and taken up again
	@$(SIDE_BY_SIDE) -m "slow and not alone and not gpu and not browser"
	$(BIN)/python -m pytest -m "alone and not soak"

browser: $(VENV)/.dev  ## the page of `layered serve` in a browser; needs chromium and chromedriver
	@$(BIN)/python -m pytest -m browser

soak: $(VENV)/.dev  ## the longest: nodes lost and found, a store away for a minute, photographs learnt by heart
	$(BIN)/python -m pytest -m soak --durations 10

check: $(VENV)/.dev  ## lint, format, types and the walls between modules
	@$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## rewrite the source as the formatter wants it
	@$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev  ## measure, and compare with peers in the same run
	@shopt -s nullglob
	for file in tests/benchmarks/bench_*.py; do
	    echo "$$file"
	    PYTHONPATH=. $(BIN)/python "$$file"
	done
	$(BIN)/layered bench
	$(BIN)/layered bench prepare
	$(BIN)/layered bench loader
	$(BIN)/layered bench train
	$(BIN)/layered bench serve
	$(BIN)/layered bench fid $(if $(wildcard $(ORACLES)/bin/python),--oracle-python $(ORACLES)/bin/python)

oracles: $(VENV)/.dev $(ORACLES)/.done  ## compare with torch-fidelity, pytorch-fid and clean-fid, live
	@$(BIN)/python -m pytest tests/oracles

clean:  ## delete the environment and the caches; datasets and runs stay
	rm -rf $(VENV) $(ORACLES) .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# Set-up. An interrupted one leaves .incomplete behind and is begun afresh. pip is renewed first, because the one that
# comes with Python 3.11 needs twice the time; --no-compile, because three modules in four are never imported, and the rest
# is compiled when it is. The second list goes in without its dependencies, for the reason that stands in it.
$(VENV)/.demo: pyproject.toml constraints.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	if [[ -e $(VENV)/.incomplete ]]; then rm -rf $(VENV); fi
	mkdir -p $(VENV)
	touch $(VENV)/.incomplete
	echo "Setting up $(VENV); the first time takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	install=($(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check)
	"$${install[@]}" --constraint constraints.txt --upgrade pip
	torch=()
	if ! nvidia-smi --list-gpus &>/dev/null && $(answers) $(TORCH_CPU); then torch=(--find-links $(TORCH_CPU)); fi
	"$${install[@]}" --constraint constraints.txt "$${torch[@]}" --editable .
	"$${install[@]}" --no-deps --requirement requirements-demo.txt
	rm $(VENV)/.incomplete
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Adding what the tests need to $(VENV)."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The anchors of evaluation, in an environment of their own: see the second list.
$(ORACLES)/.done: tests/oracles/requirements.txt $(VENV)/.demo
	@echo "Setting up $(ORACLES)."
	$(PYTHON) -m venv $(ORACLES)
	install=($(ORACLES)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
	torch=()
	if $(answers) $(TORCH_CPU); then torch=(--find-links $(TORCH_CPU)); fi
	"$${install[@]}" "$${torch[@]}" torch numpy scipy pillow tqdm requests
	"$${install[@]}" --no-deps --requirement tests/oracles/requirements.txt
	touch $@

# Without this page pip takes the build from its usual index, which works as well and is larger.
answers := $(PYTHON) -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' 2>/dev/null

.PHONY: help demo test slow browser soak check format bench oracles clean
