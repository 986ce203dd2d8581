# make train   train a deep reversible network on a small graph; ARGS="model.num_layers=112 seed=3" for options
# make test    every check: lint, formatting, types, tests, the examples in README and docstrings
# make coverage  the tests once more, with the lines and branches that they run
# make docs    the documentation as a site, in build/site
# make pictures  the pictures of the training report in docs/pictures; needs Chromium and poppler
# make bench   side-by-side benchmarks against the peers; ARGS as well, such as --quick
# make format  format the code and sort its imports
# make dist    wheel and sdist in dist/, checked as the package index checks them
# make matrix  whether the wheel installs and runs, for each Python here and several torch; tools/matrix.py has options
# make clean   remove the environment and all caches
#
# Each of them sets up .venv first, once: `make PYTHON=/path/to/python3.12` chooses the interpreter, and
# `make TORCH="torch==2.13.0 --index-url URL"` another build of torch (a certain CUDA, or none).

ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell command -v python3.11 >/dev/null 2>&1 && python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
endif
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup train test lint types unit docs pictures coverage bench format dist matrix constraints clean
.DEFAULT_GOAL := test

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "recollect needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Install one, or say where it is: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "Creating $(VENV) ..."; $(PYTHON) -m venv $(VENV); } || { \
	  echo "$(PYTHON) cannot create virtual environments (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Installing $(TORCH) ..."
	@$(BIN)/python -m pip install -q $(TORCH)
	@# Whichever build of torch that was, nothing that is installed now may replace it.
	@{ grep -v '^torch==' constraints.txt; \
	  $(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; } > $(VENV)/constraints.txt
	@echo "Installing recollect and what it needs ..."
	@$(BIN)/python -m pip install -q -e '.[train,dev,ogb,docs]' -c $(VENV)/constraints.txt
	@touch $@

train: $(READY)
	$(BIN)/recollect train $(ARGS)

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# One process for each core, with one thread each: small tensors gain nothing from more threads.
# Byte code is written, whatever the environment says: compiling the tests anew takes each process ten seconds.
unit: export OMP_NUM_THREADS := 1
unit: export PYTHONDONTWRITEBYTECODE :=
unit: $(READY)
	$(BIN)/python -m pytest tests src/recollect --doctest-modules -n logical --dist loadfile $(ARGS)

# Lines and branches that the tests run, and those that they do not: also as pages, in htmlcov/.
coverage: export OMP_NUM_THREADS := 1
coverage: $(READY)
	$(BIN)/python -m pytest tests src/recollect --doctest-modules -n logical --dist loadfile \
	  --cov --cov-report=term:skip-covered --cov-report=html $(ARGS)

# tests/test_site.py builds it too, and checks what is in it.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet
	@echo "The site is in build/site."

# Trains a small run and a small sweep, and takes pictures of their reports with headless Chromium.
pictures: $(READY)
	$(BIN)/python tools/pictures.py

# The peers are no part of the locked environment. memcnn asks for torchvision, which it does not need here.
$(BENCH_READY): $(READY)
	@echo "Installing the peers ..."
	@$(BIN)/python -m pip install -q -e '.[bench]' -c $(VENV)/constraints.txt
	@$(BIN)/python -m pip install -q --no-deps memcnn
	@touch $@

bench: $(BENCH_READY)
	$(BIN)/python -m bench.depth $(ARGS)
	$(BIN)/python -m bench.regions $(ARGS)
	$(BIN)/python -m bench.invertible $(ARGS)
	$(BIN)/python -m bench.graph $(ARGS)
	$(BIN)/python -m bench.objectives $(ARGS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# RECOLLECT_REPOSITORY=URL makes the links of the package's page those of that repository: tools/package_page.py.
dist: $(READY)
	@$(BIN)/python -m pip install -q build twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

matrix: $(READY)
	$(BIN)/python tools/matrix.py $(ARGS)

# From a new environment that only the bounds of pyproject.toml decide; torch's local version (+cpu) is cut off.
constraints:
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[train,dev,ogb,docs]'
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/^\(torch==[^+]*\)+.*/\1/'; \
	} > $(VENV)/new && mv $(VENV)/new constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov build dist
	find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
