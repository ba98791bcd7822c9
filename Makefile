# make help says what there is. Everything is installed into .venv, and nowhere else.

PYTHON ?= python3
VENV ?= .venv
# A package index for torch alone, such as https://download.pytorch.org/whl/cpu for a machine without a GPU.
TORCH_INDEX ?=
STORE ?= results/demo
# Processes that the tests are shared out among, file by file.
PROCESSES ?= 2
# Options of `python -m benchmarks.ablations` and of `python -m benchmarks.autoencoders`, such as --quick.
BENCH ?=
BENCH_SAES ?= $(filter --quick,$(BENCH))
# Options of `python -m benchmarks.overhead`, such as --prompts 5.
BENCH_RUN ?=
# Options of `python -m tests.conformance`: --write, or types by name.
CONFORMANCE ?=
# Options of `python -m tests.fuzz`, such as `-n 20000 prompts`.
FUZZ ?=
# Options of `make gpu`: the device, options of `python -m benchmarks.gpu`, the Python it runs in, and that one's version.
DEVICE ?= cuda
GPU ?=
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
GPU_VERSION ?= $(shell $(GPU_PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
GPU_NEEDS := pytest pytest-timeout pluggy iniconfig packaging pygments hypothesis sortedcontainers rich markdown-it-py mdurl

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
UNREACHED = { echo 'raymi could not be installed: see above what pip could not reach, and from where.' >&2; exit 1; }
CACHE = $${RAYMI_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/raymi}

.PHONY: help venv demo models test lint bench bench-run gpu gpu-wheels oracle conformance fuzz clean
.NOTPARALLEL:

help:
	@echo 'make demo    install raymi, fetch the demo models and run a small knockout sweep over them'
	@echo 'make test    install what the tests need, fetch the demo models and run the tests'
	@echo 'make oracle  only the tests that compare with computations that are not raymi'"'"'s'
	@echo 'make conformance  a tiny model of every causal type of transformers, against what it and plain hooks compute;'
	@echo '             four minutes; CONFORMANCE=--write records what was found in tests/conformance/types.tsv'
	@echo 'make fuzz    spoilt files of every kind, a thousand each: nothing may crash, hang or take much memory'
	@echo 'make lint    formatting, lint, types, and which room may import which'
	@echo 'make bench   raymi and its peers side by side'
	@echo 'make bench-run  what a whole run of 100,000 ablations adds to measuring them; ten minutes'
	@echo 'make gpu     what only a GPU shows: tests on it, and the benchmark; eight minutes, see benchmarks/README.md'
	@echo 'make gpu-wheels  what that needs beside torch and transformers, into .wheels, to be taken along'
	@echo 'make venv    only the virtual environment ($(VENV)) with raymi in it'
	@echo 'make clean   remove the virtual environment and caches; results and models stay'
	@echo
	@echo 'On a machine without a GPU: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu'
	@echo 'With another Python (3.11 to 3.13): make demo PYTHON=python3.12'

venv: $(VENV)/.demo

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo 'raymi needs Python 3.11, 3.12 or 3.13, and "$(PYTHON)" is none of them.' >&2; \
	  echo 'Name one: make PYTHON=/path/to/python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ -n '$(TORCH_INDEX)' ]; then \
	  echo 'installing torch from $(TORCH_INDEX)'; $(PIP) --no-deps torch --index-url '$(TORCH_INDEX)'; fi
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.made
	@echo 'installing raymi into $(VENV) ...'
	@$(PIP) -e '.[demo]' || $(UNREACHED)
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt $(VENV)/.made
	@echo 'installing raymi and what its tests need into $(VENV) ...'
	@$(PIP) -e '.[test]' || $(UNREACHED)
	@$(PIP) --no-deps dictionary-learning || $(UNREACHED)  # it wants an nnsight of years ago, and works with today's
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml constraints.txt $(VENV)/.made
	@echo 'installing raymi and the peers that it is measured against into $(VENV) ...'
	@$(PIP) -e '.[bench]' || $(UNREACHED)
	@touch $@ $(VENV)/.demo

models: $(VENV)/.demo
	@$(BIN)/python demo/models.py

demo: models
	@$(BIN)/raymi run jobs/demo.yaml --cache-dir "$(CACHE)/hub" --store $(STORE)
	@echo
	@echo 'What next:  $(BIN)/raymi report --store $(STORE)'
	@echo '            . $(BIN)/activate, and the Quick start of README.md, on the same models'

test: $(VENV)/.test
	@$(BIN)/python demo/models.py
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

oracle: $(VENV)/.test
	@$(BIN)/python demo/models.py
	$(BIN)/python -m pytest -m oracle

conformance: $(VENV)/.test
	$(BIN)/python -m tests.conformance --processes $(PROCESSES) $(CONFORMANCE)

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz --keep $(FUZZ)

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright -p pyproject.toml  # not one of a parent folder
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/.bench
	@$(BIN)/python demo/models.py
	$(BIN)/python -m benchmarks.ablations $(BENCH)
	$(BIN)/python -m benchmarks.autoencoders $(BENCH_SAES)

bench-run: $(VENV)/.bench
	@$(BIN)/python demo/models.py
	$(BIN)/python -m benchmarks.overhead $(BENCH_RUN)

# Nothing is installed: the Python that is there, and the wheels of what it lacks.
gpu:
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu --device $(DEVICE) $(GPU)

gpu-wheels:
	$(GPU_PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	  --python-version $(GPU_VERSION) --dest .wheels -c constraints.txt $(GPU_NEEDS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
