# make demo    core environment in .venv, complete run on the embedded sample
# make test    development environment in .venv-dev, all tests
# make compile NVIDIA's compiler in .venv-rtx beside the development environment, the tests that need it
# make torture kills, mutated files, absurd options, full disks, many images: about 15 minutes (TORTURE_MINUTES=...)
# make study   the five embedded models on all targets that run here, compared in one report: about 10 minutes
# make cluster Ray in .venv-ray beside the development environment, the test on a cluster of two nodes: about 2 minutes
# make wheel   the wheel in dist/, installed into .venv-wheel and run there, outside of the checkout
# make bench   benchmarks that need no data of one's own, anew into benchmarks/results: about 10 minutes
# make check   formatting, lint, types, import layers, examples in docstrings
# make docs    the site of documents in build/site
# make clean   remove environments, runs and caches

PYTHON ?= python3
TORCH := torch==2.13.0
COMPILER := tensorrt_rtx>=1.7
RAY := ray>=2.40
PYTEST_OPTIONS ?= -n auto --maxprocesses 4

CORE := .venv/bin
DEV := .venv-dev/bin

.PHONY: demo test compile study cluster wheel torture bench check docs clean

# Without byte code the core environment stays small; start-up then takes a little longer.
demo: export PYTHONDONTWRITEBYTECODE = 1
demo: .venv/installed
	$(CORE)/bitalloy run --out runs/demo
	@echo "Report: $(CURDIR)/runs/demo/report.html"
	@echo "Size of .venv: $$(du -sm .venv | cut -f1) MB"

test: .venv-dev/installed
	$(DEV)/python -m pytest $(PYTEST_OPTIONS)

compile: .venv-dev/installed .venv-rtx/installed
	PYTHONPATH=$(CURDIR)/.venv-rtx $(DEV)/python -m pytest $(PYTEST_OPTIONS) tests/*/test_compiled.py

study: .venv-dev/installed
	$(DEV)/bitalloy study --out runs/study

cluster: .venv-dev/installed .venv-ray/installed
	PYTHONPATH=$(CURDIR)/.venv-ray $(DEV)/python -m pytest -v tests/cluster

torture: .venv-dev/installed .venv-ray/installed
	PYTHONPATH=$(CURDIR)/.venv-ray $(DEV)/python -m tests.torture --out torture.json

bench: .venv-dev/installed
	$(DEV)/python benchmarks/run.py --quick

# Everything that `pip install bitalloy` gives, and nothing of the checkout. MB are those of the size limit below 30.
wheel:
	rm -rf dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	test "$$(du -sm dist/*.whl | cut -f1)" -lt 30
	.venv-wheel/bin/python -m pip install --quiet --no-compile dist/*.whl
	.venv-wheel/bin/python -m pip install --quiet --dry-run "$$(ls dist/*.whl)[openvino]"
	mkdir -p dist/outside && cd dist/outside && PYTHONPATH= ../../.venv-wheel/bin/python -P $(CURDIR)/.ci/wheel.py $(CURDIR)
	cd dist/outside && ../../.venv-wheel/bin/bitalloy --version

check: .venv-dev/installed
	$(DEV)/ruff check .
	$(DEV)/ruff format --check .
	$(DEV)/mypy
	$(DEV)/lint-imports
	$(DEV)/python -m pytest --doctest-modules src/bitalloy

docs: .venv-dev/installed
	$(DEV)/python -m mkdocs build --strict

.venv/installed: pyproject.toml
	rm -rf .venv
	PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m venv .venv
	PYTHONDONTWRITEBYTECODE=1 $(CORE)/python -m pip install --quiet --no-compile --editable .
	PYTHONDONTWRITEBYTECODE=1 $(CORE)/python -m pip uninstall --quiet --yes setuptools
	touch $@

# pip reads dependency groups from version 25.1 on.
.venv-dev/installed: pyproject.toml
	test -x $(DEV)/python || $(PYTHON) -m venv .venv-dev
	$(DEV)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(DEV)/python -m pip install --quiet --editable . --group dev "$(TORCH)"
	touch $@

# A folder of packages, so that the 300 MB of the compiler stand beside the development environment, and not in it.
.venv-rtx/installed: pyproject.toml .venv-dev/installed
	rm -rf .venv-rtx
	$(DEV)/python -m pip install --quiet --target .venv-rtx "$(COMPILER)"
	touch $@

# As that of the compiler: Ray stands beside the development environment.
.venv-ray/installed: pyproject.toml .venv-dev/installed
	rm -rf .venv-ray
	$(DEV)/python -m pip install --quiet --target .venv-ray "$(RAY)"
	touch $@

clean:
	rm -rf .venv .venv-dev .venv-rtx .venv-ray .venv-wheel build dist runs
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks reference -name __pycache__ -prune -exec rm -rf {} +
