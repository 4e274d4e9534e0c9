# The two commands a newcomer needs: `make demo` and `make test`. Both set up a pinned virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo real test test-quick test-long soak check setup clean

# Whole files go to one process, for what they set up once (a deployment, say) is theirs.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The defaults, and at the end a model of each client's own: three to five minutes on two cores.
demo: setup
	$(BIN)/apiary simulate -s personal.enabled=true

# A real instruction-tuned model on the rows of ten organisations: about twenty minutes on two cores. Model and rows lie
# beside the repository; configs/smollm2-dolly.toml is the same from the hub.
REAL := build/smollm2-135m-instruct
real: setup
	@test -f ../shared/models/make_smollm2.py || { echo "make real: ../shared/models/make_smollm2.py makes the model, and is not there; run configs/smollm2-dolly.toml, which takes it from the hub" >&2; exit 2; }
	$(BIN)/python ../shared/models/make_smollm2.py $(REAL)
	$(BIN)/apiary doctor configs/smollm2-local.toml
	$(BIN)/apiary simulate configs/smollm2-local.toml

# Everything that a change could break: some minutes on two cores.
test: check
	$(PYTEST)

# The unit tier, between two edits: about a minute.
test-quick: setup
	$(PYTEST) -m "not slow and not long and not ray"

# Separate sites as real processes: minutes of waiting for Flower's heartbeats.
test-long: setup
	$(PYTEST) -m long

# Twelve faults, twenty times each, at random moments of a real deployment: an hour or two on two idle cores.
# Goes on where it was stopped.
soak: setup
	$(BIN)/python -m benchmarks.soak

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
