# make demo | test | check | docs | help.  Everything is installed into .venv, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A process per core, at most 4, of one thread each: more threads than cores are slower than one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test check avx2 long docs fuzz
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z0-9]*\):.*##/  make \1\t/p' Makefile

demo: $(VENV)/.stamp-demo  ## train the embedded generator on this machine, then print base against tuned
	$(BIN)/cgrpo demo

test: $(VENV)/.stamp-dev  ## run the tests, but for the slow ones
	$(PYTEST) -m "not slow"

check: $(VENV)/.stamp-dev  ## what CI runs: lint, format, types, layering, all tests but the longest
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(PYTEST) -m "not long"

# A machine adds in the order of its vector units: tolerances have to hold on another one, too. Whole
# runs, servers and counts take long and compare no sums.
WHOLE_RUNS := training/test_trainer training/test_clock training/test_hacking rewards/test_remote \
	rewards/test_vlm_judge rewards/test_proxies generators/test_counts generators/test_memory
COMPUTED := ops generators training rewards
avx2: $(VENV)/.stamp-dev  ## the tests of computed numbers once more, as a CPU without AVX-512 computes them
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m "not slow" \
		$(COMPUTED:%=tests/%) $(WHOLE_RUNS:%=--ignore tests/%.py)

long: $(VENV)/.stamp-dev  ## the tests that take CI too long
	$(PYTEST) -m long

docs: $(VENV)/.stamp-dev  ## the documentation as a site, build/docs/index.html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -b html docs build/docs

fuzz: $(VENV)/.stamp-dev  ## damaged configs, data, pictures and checkpoints by the thousand
	CGRPO_FUZZ=full $(BIN)/pytest tests/fuzz

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "customized-grpo needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e '.[emoji,report]'
	@touch $@

$(VENV)/.stamp-dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e '.[bitsandbytes,datasets,dev,docs,emoji,heic,photo,playground,report,serve,tensorboard,torchao,trackio,wandb]'
	@touch $@
