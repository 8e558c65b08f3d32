# The front page of commands. Every line can be typed by hand.
.DEFAULT_GOAL := help
SHELL := /bin/sh

# The first interpreter that really runs (a pyenv shim may exist for a version that is not active).
PYTHON = $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
SUDO = $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)
BROWSER = $(shell command -v chromium || command -v chromium-browser || command -v google-chrome || echo)
BIN = .venv/bin

.PHONY: help reproduce test lab doctor clean browser

help:  ## print this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 12

reproduce: .venv/installed browser  ## install into .venv and run all notebooks (resumes; laptop, no GPU)
	$(BIN)/spinelib run --profile laptop

test: .venv/installed-test  ## lint, import floors, unit tests, every notebook with its smoke defaults
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --hypothesis-profile=ci
	$(BIN)/pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 600 notebooks/

lab: .venv/installed  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

doctor: .venv/installed  ## check this machine
	$(BIN)/spinelib doctor

clean:  ## remove runs and caches; reports/reference, data and .venv stay
	find reports -mindepth 1 -maxdepth 1 ! -name reference ! -name '*.md' -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info

.venv/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer (with venv) is needed: python.org, conda, or apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ .venv/installed

# Chromium turns interactive 3D figures into PNG. Without it everything else still works.
browser:
	@[ -n "$(BROWSER)" ] || $(MAKE) --no-print-directory browser-apt || echo "No Chromium: 3D figures stay interactive only."

.PHONY: browser-apt
browser-apt:
	$(SUDO) apt-get update -qq
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core
