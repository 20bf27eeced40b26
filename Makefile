PYTHON ?= python3
VENV := backend/.venv
LATEST := backend/.venv-latest
REQUIREMENTS := backend/requirements.txt tests/requirements.txt

.DEFAULT_GOAL := help
.PHONY: help venv run test test-latest bench lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

venv: $(VENV)/installed  ## Create backend/.venv with the tested versions (the others do it themselves)

run: venv  ## Run the server; for example make run PROVIDER=mock PORT=9000
	@exec $(VENV)/bin/python backend/main.py

test: venv  ## Run the tests
	$(VENV)/bin/python -m pytest -q tests

test-latest: $(LATEST)/installed  ## Run the tests on the newest release of every dependency
	@$(LATEST)/bin/python -m pip list --format=freeze
	$(LATEST)/bin/python -m pytest -q tests

bench: venv  ## Measure the server against bare LiteLLM (a minute or two)
	$(VENV)/bin/python tests/bench.py

lock:  ## Renew backend/constraints.txt from the requirements (PYTHON=python3.10: the oldest needs the most)
	rm -rf backend/.lock && $(PYTHON) -m venv backend/.lock
	backend/.lock/bin/python -m pip install -q $(REQUIREMENTS:%=-r %)
	backend/.lock/bin/python -m pip freeze > backend/constraints.txt
	rm -rf backend/.lock

clean:  ## Remove the virtual environments and caches
	rm -rf $(VENV) $(LATEST) backend/.lock .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Both are made again when what they are made from changes.
$(VENV)/installed: $(REQUIREMENTS) backend/constraints.txt
	@$(call make_venv,$(VENV))
	$(VENV)/bin/python -m pip install -q $(REQUIREMENTS:%=-r %) -c backend/constraints.txt
	@touch $@

$(LATEST)/installed: $(REQUIREMENTS)
	@$(call make_venv,$(LATEST))
	$(LATEST)/bin/python -m pip install -q --upgrade $(shell cat $(REQUIREMENTS) | sed 's/==.*//')
	@touch $@

define make_venv
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
endef
