# Each of these sets up .venv first. make demo: run the main job on an embedded category. make test: run the quick tests,
# some ten minutes on two cores. make test-all: run them, then the slow ones and the notebooks. make docs: build the
# documentation, dist/docs/index.html.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint docs clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo

# Two processes of one thread each are done sooner than one of two: most tests are too small to share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --durations 10

test: $(READY)
	$(PYTEST) -m "not slow"

# In one call with test, as in `make test test-all`, nothing runs twice.
test-all: test
	$(PYTEST) -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs dist/docs

# A half-finished set-up leaves no .ready behind and is done again.
$(READY): pyproject.toml constraints.txt anomalib_ot.pth
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs,offline,openvino,ray,sam,viz,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) dist results
