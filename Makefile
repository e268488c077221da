# make course   the whole course: set up, run the notebooks, print the table against the paper
# make test     set up, then ruff and pytest
# `make help` lists everything. Needs only make, sh and Python 3.11, 3.12 or 3.13.
PROFILE ?= micro
PYTHON ?=
TORCH_INDEX ?=

BIN := .venv/bin
STAMP := .venv/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# The newest Python is not the first choice: the lock was made with 3.11.
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

.PHONY: help setup course test lab clean

help:
	@echo "make course   set up, run the notebooks with PROFILE=$(PROFILE) into runs/$(PROFILE)/, print the report"
	@echo "make test     set up, then ruff and pytest (every notebook with the smoke profile among them)"
	@echo "make lab      set up, then open the notebooks in JupyterLab"
	@echo "make setup    create .venv and install requirements.lock (about 3 GB to download, 6.4 GB installed on Linux)"
	@echo "make clean    remove .venv and caches; runs/ stays, it holds your results"
	@echo "Options: PROFILE=smoke|micro|colab|paper   PYTHON=/path/to/python3.12"
	@echo "Without a GPU, on Linux, ask for a CPU-only torch at the first set-up (or after make clean):"
	@echo "  make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu"

setup: $(STAMP)

# With TORCH_INDEX, torch comes first and from there only: pip then finds torch==X satisfied by X+cpu and leaves it.
$(STAMP): requirements.lock pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  found=; for python in $(CANDIDATES); do \
	    if $$python -c '$(SUITABLE)' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "None of these is Python 3.11, 3.12 or 3.13 with venv: $(CANDIDATES)." \
	      "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "Creating .venv with `$$found --version`."; \
	  $$found -m venv --clear .venv || exit 1; \
	fi
	@echo "Installing requirements.lock into .venv: once, about 3 GB to download and 6.4 GB on disk, for torch's" \
	  "Linux build brings CUDA$(if $(TORCH_INDEX),; here torch comes from $(TORCH_INDEX) instead,; see make help for a CPU-only one)."
	$(if $(TORCH_INDEX),grep -E '^torch(vision)?==' requirements.lock > .venv/torch.txt)
	$(if $(TORCH_INDEX),$(PIP) install --no-deps --index-url $(TORCH_INDEX) -r .venv/torch.txt)
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

course: setup
	$(BIN)/ivt run --profile $(PROFILE)

test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

lab: setup
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -d runs ]; then echo "runs/ is kept: it holds your results. Remove it yourself when you want it gone."; fi
