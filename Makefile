# The two commands a newcomer needs: `make demo` and `make test`. Both set up a pinned virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long check setup clean

demo: setup
	$(BIN)/apiary simulate

# Whole files go to one process, for what they set up once (a deployment, say) is theirs.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Separate sites as real processes: minutes of waiting for Flower's heartbeats.
test-long: setup
	$(BIN)/python -m pytest -m long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/ready

# torch goes first and by its exact version: a range would take the newest build with its GPU libraries.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs dist build .pytest_cache .mypy_cache .ruff_cache
