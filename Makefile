# make demo: set up and run the main job on an embedded category. make test: set up and run tests and notebooks. make docs:
# set up and build the documentation, dist/docs/index.html.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint docs clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo

# Two processes of one thread each are done sooner than one of two: most tests are too small to share.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope

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
