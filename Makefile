.DEFAULT_GOAL := help
.PHONY: help setup lock train sample evaluate sweep report dashboard test test-integration test-slow test-faults lint format bench pictures screenshots notebooks clean

VENV   := .venv
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.ready
ARGS   ?=

help: ## this list
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-16s %s\n", $$1, $$2}'
	@echo '  ARGS="..." goes to the command, e.g. make train ARGS="schedule=linear objective=pred_noise"'

setup: $(READY) ## .venv with exactly the locked packages; the other targets do it when needed

# uv reads the lock's hashes; where it is not installed, it comes from the package index into the environment itself. The import
# writes the bytecode of what every command imports: where the environment forbids that, each would spend seconds on compiling it.
$(READY): requirements.lock pyproject.toml
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]} is not supported: install 3.11, 3.12 or 3.13, remove $(VENV) and try again")'
	@command -v uv >/dev/null || test -x $(VENV)/bin/uv || $(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	@echo "setting up $(VENV): torch and its CUDA libraries are a few GB the first time"
	@PATH="$$PATH:$(CURDIR)/$(VENV)/bin" && uv pip install --quiet --python $(PYTHON) --require-hashes -r requirements.lock \
		&& uv pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation -e .
	@env -u PYTHONDONTWRITEBYTECODE $(PYTHON) -c "import diffusion_lab.commands.train, sklearn.datasets"
	@touch $@

lock: ## write requirements.lock from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev --extra peers --extra sweeps --generate-hashes \
		--no-emit-index-url --custom-compile-command "make lock" --quiet -o requirements.lock

train: setup ## train on real digits, about two minutes on two cores
	$(PYTHON) src/train.py $(ARGS)

sample: setup ## 64 images from the latest run
	$(PYTHON) src/sample.py ckpt=latest $(ARGS)

evaluate: setup ## metrics of the latest run
	$(PYTHON) src/evaluate.py ckpt=latest $(ARGS)

sweep: setup ## schedule x objective on digits, six short runs and the page that compares them: six minutes on two cores
	@folder=outputs/multirun/schedule_objective_$$(date +%Y-%m-%d_%H-%M-%S); \
	$(PYTHON) src/train.py sweep=schedule_objective hydra/launcher=joblib hydra.launcher.n_jobs=2 trainer.max_steps=1000 \
		callbacks.samples.every=1000 callbacks.progress=null hydra.sweep.dir=$$folder $(ARGS); \
	code=$$?; $(PYTHON) src/report.py $$folder && exit $$code

report: setup ## all runs below outputs, or ARGS=FOLDER, as one HTML page
	$(PYTHON) src/report.py $(or $(ARGS),outputs)

# One thread per worker. All tests of a file run in the same worker, in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup ## the unit tests: about five minutes on two cores
	$(PYTEST) $(ARGS)

test-integration: setup ## several processes, README commands, notebooks, browser, other packages: under half an hour on two cores
	$(PYTEST) -m "integration and not slow" --timeout 900 $(ARGS)

test-slow: setup ## full-length runs and long statistics: an hour and a half on two cores
	$(PYTEST) -m slow --timeout 7200 $(ARGS)

test-faults: setup ## kills, stops and full disks at random points: under 20 minutes on two cores; ARGS=full for five times as many
	FAULTS=$(ARGS) $(PYTEST) tests/faults -m "faults or integration or not slow" --timeout 1800

lint: setup ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: setup ## ruff's formatter and safe fixes
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: setup ## speed and quality compared with peers; the tables of docs/benchmarks.md
	$(PYTHON) benchmarks/run.py $(ARGS)

dashboard: setup ## create the W&B workspace of a project (needs a login)
	$(PYTHON) src/dashboard.py $(ARGS)

pictures: setup ## apply the tasks of src/sample.py to the latest run; writes docs/tasks
	$(PYTHON) benchmarks/tasks.py $(ARGS)

notebooks: setup ## run notebooks/*.py and write their .ipynb, with figures
	OMP_NUM_THREADS=1 $(PYTHON) notebooks/execute.py $(ARGS)

screenshots: setup ## the report of ARGS=FOLDER as pictures, in docs (needs Chromium)
	$(PYTHON) benchmarks/screenshots.py $(ARGS)

clean: ## delete caches and build products, but not runs, data or the environment
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
