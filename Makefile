# Every target works on a fresh clone: it makes .venv and installs into it what it needs.
PYTHON ?= python3
BIN := .venv/bin
# A CPU build of torch where there is one: plain `torch` would pull gigabytes of CUDA.
TORCH_CPU := torch==2.13.0
UNSLOTH_CPU := unsloth==2026.10.9 unsloth_zoo==2026.10.9
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test lint bench gpu gpu-dry soak mutants clean

quickstart: .venv/base.done  ## train the tiny model on the shipped sample, show base and tuned replies
	$(BIN)/fastoss train recipes/quickstart.toml --no-resume --overwrite
	@echo "fastoss is in $(BIN): . $(BIN)/activate"

test: .venv/test.done .venv/chromium.done lint  ## everything CI runs
	$(BIN)/python -m pytest

lint: .venv/test.done  ## style, import directions, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: .venv/test.done  ## benchmarks that need no GPU
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/training_cpu.py
	$(BIN)/python benchmarks/dpo_cpu.py
	$(BIN)/python benchmarks/plan_cpu.py
	$(BIN)/python benchmarks/answers_cpu.py

gpu:  ## GPU checks in phases, on a machine with a GPU and fastoss installed with its unsloth extra
	$(PYTHON) benchmarks/gpu_checks.py

gpu-dry: .venv/test.done  ## the same script from start to end at the tiny shape, on the CPU
	$(BIN)/python benchmarks/gpu_checks.py --dry-run

soak: .venv/test.done  ## kill -9 at forty random moments of a run, resumed each time (about ten minutes)
	$(BIN)/python -m tests.faults.soak

mutants: .venv/test.done  ## deliberate faults, one at a time: do the tests notice? (more than an hour on two cores)
	$(BIN)/python -m tests.mutants

clean:
	rm -rf .venv runs

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The package before its parts: one resolver run keeps the versions together.
.venv/base.done: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing into .venv (about 1.5 GB, a minute or so) …"
	$(PIP) -c constraints.txt "$(TORCH_CPU)" -e .
	touch $@

# Unsloth without its dependencies: they would replace the CPU torch by a CUDA build.
.venv/test.done: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing into .venv, with what the tests need (about 2 GB, a minute or two) …"
	$(PIP) -c constraints.txt "$(TORCH_CPU)" -e ".[test,dev]"
	$(PIP) --no-deps $(UNSLOTH_CPU)
	touch .venv/base.done $@

# A browser for the tests of HTML pages, without root; where none can be had, those tests are skipped and say so.
.venv/chromium.done: .venv/test.done tests/fetch_chromium.py
	$(BIN)/python -m tests.fetch_chromium && touch $@ || echo "no browser: the tests of HTML pages will be skipped"
