# `make run` and `make test` are all a newcomer needs; `make help` lists the rest.
# Every target works from a path with a space: paths here are relative.

PORT ?= 4000
JOBS ?= 2
SOAK_MINUTES ?= 30
FUZZ_S ?= 60
VENV := .venv
PY := $(VENV)/bin/python

# Stamps: an install that has nothing to do costs nothing.
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
INSTALLED_FULL := $(VENV)/.installed-full
INSTALLED_BENCH := $(VENV)/.installed-bench
INSTALLED_FUZZ := $(VENV)/.installed-fuzz
INSTALLED_CONFORMANCE := $(VENV)/.installed-conformance

# Quiet after the first time, when nearly all of it is there.
PIP_INSTALL = $(PY) -m pip install --disable-pip-version-check $(if $(wildcard $(INSTALLED)),-q) -c constraints.txt

# Files of tests run in one worker each, so that a file's session fixtures start once.
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

BENCH := cpu_decode engine_tail first_token import_time lazy_rows litellm_overhead serve serve_front capacity
BENCH += state_dtype
BENCH_GPU := decode mixture prefill sparse_ffn tail grammar_gpu serve_gpu tuning_gpu quantize_gpu

.DEFAULT_GOAL := help
.PHONY: help install run check test test-full compat conformance test-litellm test-gpu test-wheel soak fuzz bench bench-gpu plots docs wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' \
	  | awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'

install: $(INSTALLED)  ## make .venv and install the package in it

run: $(INSTALLED)  ## a LiteLLM proxy on 127.0.0.1:4000 (PORT=4001: another port); Ctrl-C ends it
	@$(PY) -m mrss_provider.cli proxy --port $(PORT)

check: $(INSTALLED_TEST)  ## lint, format, types, layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_layers.py

test: $(INSTALLED_TEST)  ## the test suite, as CI runs it
	$(PYTEST)

test-full: $(INSTALLED_FULL)  ## the suite with its slow tests
	$(PYTEST) -m "not gpu"

# SHORT=1: only the cells that `make test` asks too.
conformance: $(INSTALLED_CONFORMANCE)  ## other people's clients on every route (SHORT=1: a few cells)
	$(PY) -m pytest $(if $(SHORT),,-m "not gpu") tests/conformance

test-litellm: $(INSTALLED_TEST)  ## the provider's tests on the oldest and the newest LiteLLM
	$(PY) tests/litellm_versions.py

compat: $(INSTALLED_TEST)  ## RWKV-Infer's README, replayed with curl against mrss serve
	$(PY) -m pytest -m "not gpu" tests/compat

test-gpu: $(INSTALLED_TEST)  ## what needs a CUDA device
	$(PY) -m pytest -m gpu

test-wheel: $(INSTALLED_TEST)  ## build the wheel, install it in a fresh environment, use it
	$(PY) -m pytest -m slow tests/cli/test_wheel.py

soak: $(INSTALLED_TEST)  ## half an hour of good and bad clients (SOAK_MINUTES=5: shorter)
	$(PY) benchmarks/soak.py --minutes $(SOAK_MINUTES)

fuzz: $(INSTALLED_FUZZ)  ## the parsers under atheris, a minute each (FUZZ_S=600: longer)
	PYTHONPATH=tests:tests/fuzz $(PY) tests/fuzz/atheris_parsers.py all -max_total_time=$(FUZZ_S)

bench: $(INSTALLED_TEST)  ## the benchmarks of a CPU; results go to benchmarks/results
	@for name in $(BENCH); do echo "== $$name"; $(PY) "benchmarks/$$name.py" || exit 1; done

bench-gpu: $(INSTALLED_TEST)  ## those of a CUDA device
	@for name in $(BENCH_GPU); do echo "== $$name"; $(PY) "benchmarks/$$name.py" || exit 1; done

plots: $(INSTALLED_BENCH)  ## draw docs/images from benchmarks/results
	$(PY) benchmarks/plot.py
	$(PY) benchmarks/plot_evaluation.py

docs: $(INSTALLED_TEST)  ## write anew what the documents show: commands, tables
	PYTHONPATH=tests $(PY) tests/docs_blocks.py

wheel: $(INSTALLED_TEST)  ## dist/mrss_provider-*.whl
	$(PY) -m build --wheel --no-isolation

clean:  ## remove what these targets made
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) -e .
	@touch $@

$(INSTALLED_TEST): pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) -e '.[test]'
	@touch $@ $(INSTALLED)

$(INSTALLED_FULL): pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) -e '.[test,ray,browser,conformance]'
	@touch $@ $(INSTALLED) $(INSTALLED_TEST)

$(INSTALLED_CONFORMANCE): pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) -e '.[test,conformance]'
	@touch $@ $(INSTALLED) $(INSTALLED_TEST)

$(INSTALLED_FUZZ): pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) -e '.[test,fuzz]'
	@touch $@ $(INSTALLED) $(INSTALLED_TEST)

$(INSTALLED_BENCH): pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) -e '.[bench]'
	@touch $@ $(INSTALLED)

# The first Python from 3.11 on; PYTHON=/path/to/python chooses one.
$(PY):
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  "$$python" -m venv $(VENV) && exit 0; \
	  rm -rf $(VENV); \
	  echo "error: $$python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; \
	done; \
	echo "error: no Python 3.11 or later found; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	exit 1
