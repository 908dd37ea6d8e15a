# Each target sets up .venv first. make demo: train, draw and export on the embedded category. make test: run the quick
# tests, ten to twenty minutes on two cores. make test-all: run the quick tests, then the slow ones and the notebooks.
# make docs: build the documentation, dist/docs/index.html.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint docs clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo

# Two processes with one thread are faster than one with two: most tests are too small for several threads.
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

# An incomplete set-up writes no .ready and runs again.
$(READY): pyproject.toml constraints.txt anomalib_ot.pth
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs,offline,openvino,ray,sam,viz,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) dist results
