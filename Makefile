# Everything that a checkout needs: `make` and Python 3.11 or newer with its venv module, nothing else.

PYTHON ?= python3
UV ?= uv
PYTEST_FLAGS ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

.PHONY: run install test chaos bench lint lock sbom licences audit
.DELETE_ON_ERROR:

# Without an upstream key there is nothing to relay to, so the demo brings its own upstream.
run: install
	@config="$${BEANMETER_CONFIG:-beanmeter.toml}"; \
	if [ -n "$$BEANMETER_UPSTREAM_KEY$$BEANMETER_UPSTREAM_KEY_FILE" ] \
		|| grep -Eqs "^[[:space:]]*[\"']?upstream_key(_file)?[\"']?[[:space:]]*=" "$$config"; \
	then exec $(VENV)/bin/beanmeter serve; \
	else exec $(VENV)/bin/beanmeter demo; fi

install: $(VENV)/.installed

# In the order of the files, not those with the most tests first: the longest tests are alone in theirs, and would come last.
test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

# Every fault at its full size, which takes an hour; `make test` has a little of each.
chaos: $(VENV)/.installed-dev
	TEST_CHAOS=full $(VENV)/bin/python -m pytest $(PYTEST_FLAGS) tests/chaos

# Beanmeter beside its peers, a quarter of an hour. The peers are installed under bench/.peers, each in a place of its own.
bench: $(VENV)/.installed-dev
	bench/peers/install-debian.sh
	bench/peers/install-portkey.sh
	bench/peers/install-litellm.sh
	$(VENV)/bin/python -m bench

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# What ships, as a CycloneDX bill of materials.
sbom: $(VENV)/.installed-dev
	$(VENV)/bin/python -m deploy.supply.materials dist/beanmeter.cdx.json

# The tables of docs/licences.md, from the same.
licences: $(VENV)/.installed-dev
	$(VENV)/bin/python -m deploy.supply.licences

# Known faults of what ships. Strict, for without it a package that could not be looked up would pass.
audit: $(VENV)/.installed-dev
	$(VENV)/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements-full.txt

# Writes the lock files anew, with the newest releases that fit: what is needed, that and the extras for users, all that for
# who develops. The build's lock follows the development lock where they name the same package, since both end up in one
# environment.
lock:
	$(LOCK) --upgrade pyproject.toml --output-file requirements.txt
	$(LOCK) --upgrade pyproject.toml --extra oidc --extra otel --constraint requirements.txt --output-file requirements-full.txt
	$(LOCK) --upgrade pyproject.toml --extra dev --constraint requirements-full.txt --output-file requirements-dev.txt
	printf 'hatchling>=1.27\neditables>=0.5\n' | \
		$(LOCK) --upgrade - --constraint requirements-dev.txt --output-file requirements-build.txt

# A stamp is touched last: an installation that was interrupted is taken up again.
$(VENV)/.installed: requirements.txt requirements-build.txt pyproject.toml | $(VENV)/bin/python
	@echo "Installing Beanmeter into $(VENV) ..." >&2
	$(PIP) --require-hashes -r requirements.txt
	$(PIP) --require-hashes -r requirements-build.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@echo "Installing the development tools into $(VENV) ..." >&2
	$(PIP) --require-hashes -r requirements-dev.txt
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Beanmeter needs Python 3.11 or newer, and '$(PYTHON)' is not one." \
			"Name another: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed: install the venv module (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
