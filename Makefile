# make course   the whole course: set up, run the notebooks, print the table against the paper
# make check    set up, then lint, format and the fast tests
# make test     set up, then lint and all tests
# `make help` lists everything. Needs only make, sh and Python 3.11, 3.12 or 3.13. With uv on the PATH, uv installs.
PROFILE ?= micro
PYTHON ?=
TORCH_INDEX ?=
WHEELS ?=

BIN := .venv/bin
STAMP := .venv/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Who tells pip of another index has told uv nothing.
UV := $(if $(PIP_INDEX_URL)$(PIP_EXTRA_INDEX_URL),,$(shell command -v uv 2>/dev/null))
INSTALL := $(if $(UV),uv pip install --python $(BIN)/python,$(PIP) install)
# The newest Python is not the first choice: most tests ran with 3.11.
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)
OFFLINE := $(if $(WHEELS),--no-index --find-links "$(WHEELS)")
ifneq ($(WHEELS),)
override TORCH_INDEX :=
endif
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
# Not locked, on purpose: they belong to torch's CUDA build for Linux, and torch asks for them itself, at exact versions;
# a list of them would force 3 GB onto a CPU-only torch. (torch==X also accepts the CPU-only build X+cpu.)
NOT_LOCKED := triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc \
  cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

.PHONY: help setup course check test lab book bundle lock clean

help:
	@echo "make course   set up, run the notebooks with PROFILE=$(PROFILE) into runs/$(PROFILE)/, print the report"
	@echo "make check    set up, then lint, format and the fast tests: before every commit"
	@echo "make test     set up, then lint and all tests (every notebook with the smoke profile among them)"
	@echo "make lab      set up, then open the notebooks in JupyterLab"
	@echo "make book     set up, then build the pages of the course, with the notebooks as they lie there, into build/book/"
	@echo "make setup    create .venv and install requirements.lock (about 3 GB to download, 6.4 GB installed on Linux)"
	@echo "make bundle   pack the committed project with its wheels for this platform, to be set up without a network"
	@echo "make lock     for who changes the dependencies: write requirements.lock anew (needs uv)"
	@echo "make clean    remove .venv, build/ (book, bundle) and caches; runs/ stays, it holds your results"
	@echo "Options: PROFILE=smoke|micro|colab|paper   PYTHON=/path/to/python3.12   WHEELS=folder (of a bundle)"
	@echo "         UV= to install with pip where uv is there, too"
	@echo "Without a GPU, on Linux, ask for a CPU-only torch at the first set-up (or after make clean):"
	@echo "  make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu"

setup: $(STAMP)

# With TORCH_INDEX, torch comes first and from there only: pip then finds torch==X satisfied by X+cpu and leaves it.
$(STAMP): requirements.lock pyproject.toml
	@if $(BIN)/python -c '' 2>/dev/null && ! $(BIN)/python -c '$(FITS)' 2>/dev/null; then \
	  echo "The folder .venv holds `$(BIN)/python --version 2>&1`, and the course runs on Python 3.11, 3.12 or 3.13." \
	    "Delete it (rm -r .venv), then give the same command again." >&2; exit 1; fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  found=; seen=; for python in $(CANDIDATES); do \
	    version=`$$python --version 2>/dev/null` || continue; \
	    if ! $$python -c '$(FITS)' 2>/dev/null; then seen="$$seen $$python is $$version."; \
	    elif $$python -c 'import venv, ensurepip' 2>/dev/null; then found=$$python; break; \
	    else seen="$$seen $$python lacks venv or ensurepip (Debian: python3-venv)."; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "The course needs Python 3.11, 3.12 or 3.13, and finds none under these names: $(CANDIDATES).$$seen" \
	      "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "Creating .venv with `$$found --version`."; \
	  $$found -m venv --clear .venv || exit 1; \
	fi
	@if [ -n "$(WHEELS)" ] && ! ls "$(WHEELS)"/*.whl >/dev/null 2>&1; then \
	  echo "There are no wheels in $(WHEELS): run this in an unpacked bundle (make bundle), or leave WHEELS out." >&2; exit 1; fi
	@echo "Installing requirements.lock into .venv with $(if $(UV),uv,pip): once," $(if $(WHEELS),"from $(WHEELS) and without a network.", \
	  "about 3 GB to download and 6.4 GB on disk, for torch's Linux build brings" \
	  "CUDA$(if $(TORCH_INDEX),; here torch comes from $(TORCH_INDEX) instead,; see make help for a CPU-only one).")
	$(if $(TORCH_INDEX),grep -E '^torch(vision)?==' requirements.lock > .venv/torch.txt)
	$(if $(TORCH_INDEX),$(INSTALL) --no-deps --index-url $(TORCH_INDEX) -r .venv/torch.txt)
	$(INSTALL) -r requirements.lock $(OFFLINE)
	$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@
	@echo "The set-up is done. For the command ivt, say in each terminal: source .venv/bin/activate"

course: setup
	$(BIN)/ivt run --profile $(PROFILE)

# One process a core, each with one thread. A file of tests stays in one process, so that what it shares is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(PYTEST) -m "not slow"

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(PYTEST)

lab: setup
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks

# One list for every Python of the README, from its first patch release on. Versions stay as they are listed: delete a
# line, or the whole file, to let packages move. Then run tests/test_packaging.py.
lock:
	@test -n "$(UV)" || { \
	  echo "make lock needs uv. Only who changes the dependencies needs it: the lock comes with the course." >&2; exit 1; }
	uv pip compile pyproject.toml --extra book --extra test --group build --universal --python-version 3.11 \
	  --fork-strategy fewest --no-annotate $(NOT_LOCKED:%=--no-emit-package %) -o requirements.lock

# The source folder is the project: the pages' links to each other hold here and there. A warning is an error.
book: setup
	@rm -rf build/book build/book.cache
	@$(BIN)/ivt build live || echo "So the page Try it of this book has no students."
	$(BIN)/sphinx-build -q -W --keep-going -d build/book.cache -c docs . build/book
	@echo "The book is $(CURDIR)/build/book/index.html: open this file in a browser. It needs no server and no network."
	@echo "Its page Try it needs a server: $(BIN)/python -m http.server -d build/book, then http://localhost:8000/docs/live.html"

# Of everything in the lock a wheel (`pip wheel` builds what has none), so that nothing is built where it is unpacked.
NAMED := import sys, sysconfig, ivt_utils; print("ivt-course", ivt_utils.__version__, \
  sysconfig.get_platform(), "py%d%d" % sys.version_info[:2], sep="-")
BUNDLE = $(shell $(BIN)/python -c '$(NAMED)')
MINOR = $(shell $(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')

bundle: setup
	@git rev-parse --quiet --verify HEAD >/dev/null 2>&1 || { \
	  echo "make bundle packs what is committed: run it in a git clone of the course." >&2; exit 1; }
	@git diff --quiet HEAD || echo "Note: changes that are not committed are left out."
	@echo "Making build/$(BUNDLE).tar: about 3 GB, less with a CPU-only torch (TORCH_INDEX, see make help)." \
	  "Twice that is needed on the disk until it is packed."
	@test -n "$(BUNDLE)"
	rm -rf build/$(BUNDLE)
	mkdir -p build/$(BUNDLE)/wheels
	git archive HEAD | tar -xf - -C build/$(BUNDLE)
	$(if $(TORCH_INDEX),grep -E '^torch(vision)?==' requirements.lock > .venv/torch.txt)
	$(if $(TORCH_INDEX),$(PIP) wheel -w build/$(BUNDLE)/wheels --no-deps --index-url $(TORCH_INDEX) -r .venv/torch.txt)
	$(PIP) wheel -w build/$(BUNDLE)/wheels --find-links build/$(BUNDLE)/wheels -r build/$(BUNDLE)/requirements.lock
	@printf '%s\n' \
	  'The course, to be set up without a network. The wheels are for one kind of computer and Python $(MINOR):' \
	  '  $(BUNDLE)' '' 'Linux and macOS, in this folder:' \
	  '  make setup WHEELS=wheels PYTHON=python$(MINOR)' '  make course' > build/$(BUNDLE)/START.txt
	tar -cf build/$(BUNDLE).partial -C build $(BUNDLE)
	mv build/$(BUNDLE).partial build/$(BUNDLE).tar
	@rm -rf build/$(BUNDLE)
	@echo "Made build/$(BUNDLE).tar (`du -h build/$(BUNDLE).tar | cut -f1`). Unpack it anywhere and read START.txt."

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -d runs ]; then echo "runs/ is kept: it holds your results. Remove it yourself when you want it gone."; fi
