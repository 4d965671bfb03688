PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
ROWS = plus
DATASET = $(shell sed -n 's/^dataset: *\([^ ]*\).*/\1/p' params.yaml)
PIP := $(PY) -m pip --disable-pip-version-check

# The stages of dvc.yaml call `python`: this environment's.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help demo reproduce plus report bench test test-all lab lint strip clean install embedded

help:
	@echo 'Usage: make TARGET [PYTHON=python3.12]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## make the environment in .venv (about 2 GB; with CUDA more)

# Without the stamp the environment is absent or half made, so it is made afresh; with it, it is brought up to date.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'ld3m needs Python 3.11 or newer and "$(PYTHON)" is not: name one, as in make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@echo 'Installing the packages of requirements.lock into $(VENV): a few minutes the first time'
	@test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	@$(PIP) install --quiet -r requirements.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# Brings the embedded data and priors out of store/ where they are not there yet.
embedded: $(INSTALLED)
	@test -d store && test -z "$$(git ls-files --deleted store)" || { \
	  echo 'store/ is missing or lacks files that Git has: `git checkout -- store` restores them' >&2; exit 1; }
	@test -d data/mnist5k || $(PY) -m dvc pull data.dvc
	@test -d runs/mnist5k/prior || $(PY) -m dvc pull --allow-missing prior
	@test -d runs/mnist5k/gan || $(PY) -m dvc pull --allow-missing gan

demo: embedded ## distill ten digits with LD3M, train networks on them, compare with pixels and real digits
	@OMP_NUM_THREADS=1 $(PY) -m ld3m.pipeline.papermill_engine -k python3 notebooks/00_demo.ipynb reports/mnist5k/notebooks/demo.ipynb
	@echo && cat reports/mnist5k/notebooks/demo.md && echo
	@echo 'pictures  reports/mnist5k/notebooks/demo.ipynb (make lab opens the notebooks)'
	@echo 'next      make reproduce'

reproduce: embedded ## run what the main table needs (only what changed) and print it
	@$(PY) -m ld3m.pipeline.check
	@$(PY) -m dvc repro tables
	@echo && cat reports/$(DATASET)/tables/main/main.md && echo
	@echo 'tables    reports/$(DATASET)/tables/main/'
	@echo 'figures   reports/$(DATASET)/figures/main/'
	@echo 'notebooks reports/$(DATASET)/notebooks/ (executed)'

plus: embedded ## compare LD3M+ with LD3M, pixels, GLaD and selection over five sets each (after reproduce)
	@OMP_NUM_THREADS=1 $(PY) -m ld3m.pipeline.papermill_engine -k python3 notebooks/07_plus.ipynb reports/$(DATASET)/notebooks/plus.ipynb -r rows $(ROWS)
	@echo && cat reports/$(DATASET)/$(ROWS:$(DATASET)_%=%)/table.md && echo
	@echo 'figure    reports/$(DATASET)/$(ROWS:$(DATASET)_%=%)/accuracy-seconds.png'

report: embedded ## run the whole pipeline: more spaces, controls and runs, ablations, an HTML report
	@$(PY) -m ld3m.pipeline.check
	@$(PY) -m dvc repro
	@echo && cat reports/$(DATASET)/tables/report/main.md && echo
	@echo 'report    reports/$(DATASET)/index.html'

test: embedded ## run the tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

test-all: embedded ## run the slow tests too, some of them on a Ray cluster of this machine or with models of full size (installs Ray; 8 GB, about half an hour)
	@$(PIP) install --quiet -e '.[cluster]'
	@export LD3M_FULL_SIZE=1 LD3M_KILLS=$$(date +%s); \
	  echo "stages are killed at the moments of LD3M_KILLS=$$LD3M_KILLS"; $(PY) -m pytest -q -m ''

# Passive threads, because ones that spin wherever another process also wants a core are timed too.
bench: embedded ## measure speed and memory against plain ways of doing the same (seven minutes on two idle cores)
	@OMP_WAIT_POLICY=passive $(PY) -m benchmarks

lab: embedded ## open the notebooks in Jupyter Lab
	@$(PY) -m jupyterlab notebooks

lint: $(INSTALLED) ## check the code and the notebooks with ruff
	@$(PY) -m ruff check .

strip: $(INSTALLED) ## remove outputs from the notebooks, but from 01_method, as they are committed
	@$(PY) -m nbstripout $(filter-out notebooks/01_method.ipynb,$(wildcard notebooks/*.ipynb))

clean: ## remove caches, decoded images too; results, downloads and the environment stay
	@rm -rf cache .pytest_cache .ruff_cache ld3m.egg-info
	@find . -name .venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
