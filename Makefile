# Everything runs in .venv, which is made on first use:  make demo  |  make test
PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
TORCH := $(shell grep '^torch==' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help venv demo test walk docs gpu lint format verify-vllm clean
.DEFAULT_GOAL := help

help:  ## Show these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

venv: $(INSTALLED)  ## Create .venv and install mtpd and its tools

# torch comes first and alone: on a machine without a GPU, from PyTorch's index of CPU builds, unless pip's
# own sources already have one. The rest would otherwise bring in several GB of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"mtpd needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@echo "Installing into $(VENV): takes some minutes"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@index=""; \
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
	    && ! $(BIN)/pip index versions torch 2>/dev/null | grep -qF '$(patsubst torch==%,%,$(TORCH))+cpu'; then \
	    index="--extra-index-url $(CPU_INDEX)"; \
	fi; \
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt --no-deps $$index $(TORCH)
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

# A gigabyte, which tests alone need where there is no GPU. Builds of torch for CUDA bring their own.
$(KERNELS): $(INSTALLED)
	@test "$$(uname -s)" != Linux || $(BIN)/python -c 'import triton' 2>/dev/null \
	    || $(BIN)/pip install -qq --disable-pip-version-check triton
	@touch $@

demo: $(INSTALLED)  ## Train heads for a small real model, and measure the gain
	$(BIN)/mtpd distill demo

# One thread for each test process: more of them than cores make each other slow.
test: lint $(KERNELS)  ## Check style and types, and run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS)

# SIZE=small cuts short what takes long. `python tests/walk.py --help` says how to go on from one of the commands.
SIZE ?= full
walk: $(INSTALLED)  ## Run every command that the documents print, from a wheel
	$(BIN)/python tests/walk.py --size $(SIZE)

docs: $(INSTALLED)  ## Build the documentation site in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Needs an NVIDIA GPU and no network. What was found is in build/gpu.
gpu: $(INSTALLED)  ## Check on this machine's GPU that all works, and measure how fast (docs/gpu.md)
	$(BIN)/python -m benchmarks.gpu --out build/gpu

lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

format: $(INSTALLED)  ## Format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs a finished run. vLLM gets a virtual environment of its own in ~/.cache/mtpd.
RUN ?= runs/demo
EXPORTS ?= build/exports
verify-vllm: $(INSTALLED)  ## Serve exported heads of RUN with vLLM on this machine, and let it answer prompts
	rm -rf $(EXPORTS)
	$(BIN)/mtpd export $(RUN) --to mtpd-vllm -o $(EXPORTS)/mtpd-vllm
	$(BIN)/mtpd verify $(EXPORTS)/mtpd-vllm --engine vllm --limit 6 --max-new-tokens 64
	$(BIN)/mtpd export $(RUN) --to mimo-draft --depth 1 -o $(EXPORTS)/mimo-draft
	$(BIN)/mtpd verify $(EXPORTS)/mimo-draft --engine vllm --limit 4
	$(BIN)/mtpd export $(RUN) --to hyv3-draft --depth 1 -o $(EXPORTS)/hyv3-draft
	$(BIN)/mtpd verify $(EXPORTS)/hyv3-draft --engine vllm --limit 4
	$(BIN)/python benchmarks/responses.py --ways slots,vllm --prompts 24

clean:  ## Delete .venv and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
