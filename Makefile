# Needs make, a POSIX shell and one Python of 3.11 or later. Each target makes
# the virtual environment .venv-py3.X when there is none, from the versions in
# constraints/, and leaves it alone while setup.py and the constraints stay as
# they are: then nothing is installed or downloaded.

# The interpreter; empty picks one (tools/find_python says how).
PYTHON ?=
# Further extras to install, such as EXTRAS=cuda12.
EXTRAS ?=
# Further arguments to the program or to pytest.
ARGS ?=
# Where `make reproduce` writes.
WORKDIR ?= runs/quick
# Test processes: one a core, at most eight.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN \
  2>/dev/null || echo 2); [ $$n -le 8 ] || n=8; echo $$n)
# Pythons that `make test-all` leaves out, such as SKIP="3.12 3.13".
SKIP ?=

.DEFAULT_GOAL := help
.PHONY: help reproduce test test-slow test-exhaustive test-all lint format env python clean

# $(call environment,EXTRAS) sets the shell variable python to the interpreter
# of an environment that has them.
find = PYTHON='$(PYTHON)' sh tools/find_python
environment = found=$$($(find)) && \
  python=$$("$$found" tools/environment.py $(1) $(EXTRAS))
pytest = "$$python" -m pytest -q -n $(WORKERS) --dist=worksteal

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20
	@echo 'Variables: PYTHON= EXTRAS= ARGS= WORKDIR= WORKERS= SKIP= (Makefile)'

reproduce: ## train a small DeepSeek-V3.2 through the paper's stages, and report
	@$(environment) && "$$python" experiments/continued_training.py \
	  --config=experiments/configs/continued_training.py:quick \
	  --workdir='$(WORKDIR)' $(ARGS)
	@echo 'The report: $(abspath $(WORKDIR))/report.md'
	@echo '            $(abspath $(WORKDIR))/report.html'

test: ## the test suite on one Python, without the slow tests
	@$(call environment,test tokenizers serve rl evals) && \
	  $(pytest) -m 'not slow and not exhaustive and not gpu' $(ARGS)

# pytest exits with 5 when it selects no test: fine here, an error in `test`.
test-slow: ## the tests marked slow, on one Python
	@$(call environment,test tokenizers serve rl evals) && \
	  { $(pytest) -m 'slow and not gpu and not exhaustive' --timeout=900 \
	      $(ARGS) || \
	    { status=$$?; [ $$status = 5 ] || exit $$status; \
	      echo 'no test is marked slow'; }; }

test-exhaustive: ## every case of the longest tests; more than an hour
	@$(call environment,test tokenizers serve rl evals) && \
	  "$$python" -m pytest -q -m 'exhaustive and not gpu' --timeout=1800 $(ARGS)

test-all: ## the suite on every Python found, and the slow tests on one
	@MAKE='$(MAKE)' PYTHON='$(PYTHON)' SKIP='$(SKIP)' sh tools/test_all

lint: ## ruff and the type checker
	@$(call environment,dev test tokenizers serve rl evals) && bin=$$(dirname "$$python") && \
	  "$$bin/ruff" check . && "$$bin/ruff" format --check . && \
	  "$$bin/pyrefly" check --python-interpreter-path "$$python"

format: ## format the code and sort its imports
	@$(call environment,dev test tokenizers serve rl evals) && bin=$$(dirname "$$python") && \
	  "$$bin/ruff" check --fix-only . && "$$bin/ruff" format .

env: ## an environment for development; prints its interpreter
	@$(call environment,dev notebooks test tokenizers serve rl evals) && echo "$$python"

python: ## which Python is chosen
	@$(find)

clean: ## remove the environments and caches (not runs/)
	@rm -rf .venv-py3.* build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +
