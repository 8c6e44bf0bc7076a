# `make train` and `make test` are all that a newcomer needs; everything happens in .venv
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup dev train lint test test-slow newest matrix families faults lab bench docs render clean

.venv/run: settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing alpaca_ft and what it needs into .venv"
	$(PIP) -e .
	@touch $@

.venv/dev: .venv/run
	@echo "installing the development tools"
	$(PIP) -e '.[dev]'
	@touch $@

setup: .venv/run
dev: .venv/dev

train: setup
	$(BIN)/alpaca_ft train
	$(BIN)/alpaca_ft evaluate "$$(ls -dt runs/*/ | head -n 1)"

test: dev
	$(BIN)/python -c "from alpaca_ft.model import demo_model; demo_model()"
	cd nbs && OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(CURDIR)/$(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slow: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# an environment of its own, .venv-newest, so that the pinned one stays as it is
newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	.venv-newest/bin/python -c "from alpaca_ft.model import demo_model; demo_model()"
	.venv-newest/bin/python tools/newest.py newest.md

lint: dev
	$(BIN)/ruff check .

matrix: dev
	$(BIN)/python tests/matrix.py --workers 2 $(MATRIX)

families: dev
	$(BIN)/python tests/families.py $(FAMILIES)

faults: dev
	$(BIN)/python tests/faults.py 50

lab: dev
	$(BIN)/jupyter lab nbs

render: dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/render.py readme

docs: dev
	rm -rf _docs _proc && mkdir -p _proc
	$(BIN)/python tools/render.py site _proc
	$(BIN)/zensical build --clean

bench: dev
	$(BIN)/python benchmarks/bench.py $(BENCH)

clean:
	rm -rf .venv build dist _docs _proc *.egg-info .pytest_cache
