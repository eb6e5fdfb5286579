# `make demo` and `make test` need Python 3.11 or newer and nothing else: the first call builds .venv.
# `make weights RUN=FOLDER NAME=fashion RECORD=evaluate.json` makes a flow that comes with the package.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check weights wheel docs clean

demo: $(VENV)/installed
	$(BIN)/flowback demo

test: check
	$(BIN)/pytest --durations=10 --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The averaged weights of a run in fp16, with their card, picture and evaluation record.
weights: $(VENV)/installed
	$(BIN)/flowback push $(RUN) $(NAME) --record $(RECORD) --half --licence apache-2.0 --guidance 1 \
		--out src/flowback/weights/$(NAME)

# Both distributions, checked, and the wheel tried in an empty environment; `make wheel DEPENDENCIES=lowest`
# takes the lowest versions that pyproject.toml allows.
DEPENDENCIES ?= newest
wheel: $(VENV)/installed
	$(BIN)/python .ci/wheel.py $(DEPENDENCIES)

docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "flowback needs Python 3.11 or newer, \
	and $(PYTHON) is %d.%d; run make PYTHON=/path/to/a/newer/python." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@
