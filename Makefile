# The whole workflow: `make help` lists it. Windows has no make; README.md gives the
# plain commands.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
READY := $(VENV)/.ready

# What `make demo` looks at, asks for and writes.
DEMO_IMAGE ?= vlm/assets/examples/scene.png
DEMO_PROMPT ?= detect owl
DEMO_OUTPUT ?= demo.png

# Where `make bench` measures: cpu or cuda.
DEVICE ?= cpu

# Quiet, repeatable kernels: no progress bars, no warnings about forks and debuggers.
export TQDM_DISABLE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export TOKENIZERS_PARALLELISM := false
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv book test test-gpu demo lab export bench full-size check-book clean-notebooks format clean

help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(READY) ## Create .venv with everything in it (the other targets do this for you)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed: make PYTHON=/path/to/python3 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

book: $(READY) ## Run every notebook and build the book, warnings as errors
	@$(PY) tools/forget_stale_outputs.py
	$(BIN)/jupyter-book build . -W -n --keep-going
	@echo "The book is at file://$(CURDIR)/_build/html/index.html"

test: $(READY) ## Check the style, run the tests and every notebook
	@echo "== style"
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@echo "== tests"
	$(PY) -m pytest
	@echo "== every notebook, from top to bottom"
	@$(PY) tools/forget_stale_outputs.py
	$(PY) -m pytest --nbmake --nbmake-timeout=600 notebooks

test-gpu: $(READY) ## On a machine with a CUDA GPU: the tests that need it, and every notebook
	$(PY) -m pytest -m gpu
	$(PY) -m pytest --nbmake --nbmake-timeout=600 notebooks

check-book: $(READY) ## Test the built book: links, no outside request, real browser
	$(PY) -m pytest tests/test_book.py

demo: $(READY) ## Ask the embedded model to find something in a picture
	$(PY) -m vlm.inference --prompt "$(DEMO_PROMPT)" \
	  --image_file_path "$(DEMO_IMAGE)" --output "$(DEMO_OUTPUT)"

lab: $(READY) ## Open the notebooks in JupyterLab
	TQDM_DISABLE= HF_HUB_DISABLE_PROGRESS_BARS= $(BIN)/jupyter lab --notebook-dir notebooks

export: $(READY) ## Write vlm/*.py from the notebooks
	$(PY) tools/export.py

bench: $(READY) ## Measure speed and memory against transformers
	$(PY) benchmarks/run.py --device $(DEVICE)

full-size: $(READY) ## Check a random 3B checkpoint: 7 GB of disk, 18 GB of memory
	$(PY) tools/check_full_size.py

clean-notebooks: $(READY) ## Strip outputs, counts and metadata from the notebooks
	$(PY) tools/clean_notebooks.py

format: $(READY) ## Format all Python, in notebooks too
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## Remove what was built (but not .venv)
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo.png
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
