# The Pythons that backend/constraints.txt is for, the newest first, and the systems, by uv's names.
PYTHONS := 3.14 3.13 3.12 3.11 3.10
PLATFORMS := x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu aarch64-apple-darwin x86_64-pc-windows-msvc

# python3 if it is one of them, otherwise the newest on PATH. make PYTHON=... wins.
supported = $(1) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(PYTHONS)".split())' 2>/dev/null
PYTHON ?= $(shell for python in python3 $(PYTHONS:%=python%); do $(call supported,$$python) && echo $$python && break; done)
FOUND = $(or $(PYTHON),python3)
APP := backend/main.py
VENV := backend/.venv
LATEST := backend/.venv-latest
REQUIREMENTS := backend/requirements.txt tests/requirements.txt
LINT := tests/requirements-lint.txt tests/postgres/requirements.txt
ON_POSTGRES := $(patsubst %,tests/test_%.py,store chat leaving requests memory)
UV := backend/.lock/bin/uv
COMPILE := $(UV) pip compile -q --no-header --no-annotate --only-binary :all: $(REQUIREMENTS)

.DEFAULT_GOAL := help
.PHONY: help venv run test test-slow test-repository test-postgres postgres test-latest test-browser lint bench bench-postgres lock check-lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

venv: $(VENV)/installed  ## Create backend/.venv with the tested versions (run, test and others do this first)

run: venv  ## Run the server, or a file: make run APP=tests/examples/widget.py PROVIDER=mock
	@PYTHONPATH=backend:tests/examples:tests/postgres exec $(VENV)/bin/python $(APP)

test: venv  ## Run the tests, except the slow ones
	$(VENV)/bin/python -m pytest -q -m "not slow"

test-slow: venv  ## Run the slow tests: many chats at once, new processes, a browser
	$(VENV)/bin/python -m pytest -q -m slow

test-repository: venv  ## Run the tests of this repository: README, Makefile, pins, budget
	$(VENV)/bin/python -m pytest -q tests/repository

test-postgres: postgres  ## Run the tests of threads and items on PostgreSQL, with two workers
	$(VENV)/bin/python -m pytest -q --postgres -m "not slow" $(ON_POSTGRES) tests/postgres

postgres: venv
	@$(VENV)/bin/python tests/postgres/cluster.py
	@$(VENV)/bin/python -m pip install -q -r tests/postgres/requirements.txt -c backend/constraints.txt

test-latest: $(LATEST)/installed  ## Run the tests, without PostgreSQL's, on the newest releases
	@$(LATEST)/bin/python -m pip list --format=freeze
	$(LATEST)/bin/python -m pytest -q -o norecursedirs=postgres --ignore tests/repository/test_customised_copy.py

test-browser: venv  ## Test the page at /chatkit in a browser (apt-get install chromium)
	@$(VENV)/bin/python -m pip install -q -r tests/requirements-browser.txt -c backend/constraints.txt
	$(VENV)/bin/python -m pytest -q tests/test_browser.py

lint: venv  ## Check the format, the code and the types with ruff and mypy
	@$(VENV)/bin/python -m pip install -q $(LINT:%=-r %) -c backend/constraints.txt
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

bench: venv  ## Measure the server against openai-agents alone (a few minutes)
	$(VENV)/bin/python tests/bench.py

bench-postgres: postgres  ## Measure the server on PostgreSQL, with one worker and with two
	$(VENV)/bin/python tests/postgres/bench_postgres.py

lock: $(UV)  ## Renew backend/constraints.txt: one set for every supported Python and system
	@# mcp 2 needs a newer starlette than FastAPI, on Python 3.14 alone. Without this line all would get mcp 1.
	@echo "mcp>=2 ; python_version < '3.14'" > backend/.lock/mcp.txt
	$(COMPILE) --universal --fork-strategy fewest --python-version $(lastword $(PYTHONS)) -c backend/.lock/mcp.txt > backend/.lock/all.txt
	@# Only where there are two versions of a package they need their markers.
	@awk -F== 'NR == FNR { lines[$$1]++; next } lines[$$1] == 1 { sub(/ ;.*/, "") } 1' backend/.lock/all.txt backend/.lock/all.txt \
		> backend/constraints.txt
	@$(MAKE) --no-print-directory check-lock

check-lock: $(UV)  ## Resolve backend/constraints.txt, from wheels alone, for every supported Python and system
	@for python in $(PYTHONS); do for platform in $(PLATFORMS); do \
		found=$$($(COMPILE) --python-version $$python --python-platform $$platform -c backend/constraints.txt) \
		&& echo "Python $$python on $$platform: $$(echo "$$found" | wc -l) packages" \
		|| { echo "Python $$python on $$platform: backend/constraints.txt does not resolve" >&2; exit 1; }; \
	done || exit 1; done

clean:  ## Remove the virtual environments and caches
	rm -rf $(VENV) $(LATEST) backend/.lock .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Both are made again when what they are made from changes.
$(VENV)/installed: $(REQUIREMENTS) backend/constraints.txt
	@$(call make_venv,$(VENV))
	@echo "Installing about 80 packages into $(VENV). It takes one to two minutes."
	@$(VENV)/bin/python -m pip install -q $(REQUIREMENTS:%=-r %) -c backend/constraints.txt
	@touch $@

$(UV):
	@$(call make_venv,backend/.lock)
	backend/.lock/bin/python -m pip install -q uv

$(LATEST)/installed: $(REQUIREMENTS)
	@$(call make_venv,$(LATEST))
	$(LATEST)/bin/python -m pip install -q --upgrade $(shell cat $(REQUIREMENTS) | sed 's/==.*//')
	@touch $@

define make_venv
	$(if $(shell $(call supported,$(FOUND)) && echo yes),,$(error $(UNSUPPORTED)))
	rm -rf $(1)
	$(FOUND) -m venv $(1)
endef
UNSUPPORTED = $(FOUND) is $(or $(shell $(FOUND) --version 2>/dev/null),missing). Python $(PYTHONS) are supported: \
	make PYTHON=/path/to/python, or uv run backend/main.py, which fetches one
