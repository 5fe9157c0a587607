# Every target sets up what it needs: the virtual environment .venv and, in it, this package with its test tools.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
# torch is named beside the package, with pyproject's own range, so that pip settles its build before all else.
TORCH := $(shell sed -n 's/^ *"\(torch>=[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test loops slow lint

demo: $(INSTALLED)    ## generate data and an encoder, train, evaluate, export, search: about a minute
	$(VENV)/bin/trainer demo

test: $(INSTALLED)    ## everything but what is marked slow, and the loops of tests/slow
	$(VENV)/bin/python -m pytest tests --ignore=tests/slow -m 'not slow' --durations=10 -n 3 --dist loadgroup \
		--no-loadscope-reorder

loops: $(INSTALLED)   ## five kills, three preemptions on a local Slurm, the benchmarks of the README: short
	$(VENV)/bin/python -m pytest tests/slow/test_reliability.py tests/slow/test_benchmarks.py --durations=0 -n 2

slow: $(INSTALLED)    ## these loops, parity with sentence-transformers' own trainer, and what tests marks slow
	$(VENV)/bin/python -m pytest tests/slow --durations=10
	$(VENV)/bin/python -m pytest tests --ignore=tests/slow -m slow --durations=10

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	@if command -v shellcheck >/dev/null; then shellcheck slurm/*.sh .ci/run; \
	else echo "shellcheck is not installed: the shell scripts stay unread"; fi

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet '$(TORCH)' -e '.[test]'
	touch $@
