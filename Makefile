# make demo       text -> tokenizer -> token store -> trained model -> sampled text, on real text this machine has
# make test       linter and tests, on PYTHON and, where one is found, partly on a newer Python with the newest JAX
# make test-all   the same with the slow tests
# make bench      the benchmarks against other software (installs torch)
# make clean      remove the environments and caches made here; data/ and runs/ stay
#
# PYTHON=python3.12 chooses the interpreter, EXTRAS=cuda (or tpu, hf, ...) adds optional packages to the environment:
# `make test EXTRAS=parity,data,remote,notebook` also compares with transformers on torch and with seqio, reads from a local S3
# server and runs the Colab notebook, as CI does. WORKERS=8 runs the tests in as many processes.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all run-tests run-part bench clean check

GIVEN := $(origin PYTHON)
runs = $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
EXTRAS ?=

# The default Python: python3, or else the first newer one that really runs (a version manager's shim may not).
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
	if $(call runs,$$p); then echo $$p; exit; fi; done; echo python3)
PYTHON := $(PYTHON)
VERSION := $(call version,$(PYTHON))
VENV ?= .venv-$(VERSION)
PY := $(VENV)/bin/python

# JAX looks for accelerators by itself; without one, saying so saves its warnings and metadata look-ups.
ACCELERATOR := $(wildcard /dev/accel* /dev/vfio/[0-9]*)$(shell nvidia-smi -L 2>/dev/null)
ifeq ($(strip $(ACCELERATOR)),)
JAX_PLATFORMS ?= cpu
export JAX_PLATFORMS
endif
PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_DISABLE_PIP_VERSION_CHECK
unexport PYTHONPATH PYTHONHOME

# One environment per Python version; an empty file in it names the extras it has (.has-base, .has-test-plan).
# The tests compile the big recipes and the kernels for TPUs, with libtpu ([plan]) and no TPU, and on newer Pythons the
# kernels for Hopper GPUs, with JAX's CUDA plugin ([aot]) and no GPU.
comma := ,
empty :=
space := $(empty) $(empty)
stamp = $(VENV)/.has-$(subst $(space),-,$(strip $(or $(subst $(comma),$(space),$(1)),base)))
FOR_DEMO := $(call stamp,$(strip $(EXTRAS)))
FOR_TEST := $(call stamp,test plan $(if $(filter-out 3.11,$(VERSION)),aot) $(EXTRAS))
FOR_BENCH := $(call stamp,bench $(EXTRAS))

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

check:
	@command -v git >/dev/null || { echo "make: git is missing; install it (Debian, Ubuntu: apt install git)" >&2; exit 2; }
	@$(call runs,$(PYTHON)) || { echo "make: neo needs Python 3.11 or newer, $(PYTHON) is $(or $(VERSION),missing);" \
		"install one and name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments;" \
		"install its venv module (Debian, Ubuntu: apt install python$(VERSION)-venv)" >&2; exit 2; }

$(VENV)/.has-%: setup.py constraints.txt | check
	@echo "Installing neo and what it needs into $(VENV): the first time about 270 MB to download, 1.1 GB of disk and a few minutes."
	@echo "$(if $(findstring plan,$*),The TPU compiler adds 140 MB to download and 640 MB of disk. \
		)$(if $(findstring aot,$*),The CUDA plugin adds 210 MB to download and 380 MB of disk. )$(if $(findstring bench,$*),torch adds 0.2 to 3 GB. \
		)$(if $(filter demo,$(MAKECMDGOALS)),The demo then takes 4 to 8 minutes on 2 cores and 4 GB of memory.)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --progress-bar off -e '.$(if $(filter-out base,$*),[$(subst -,$(comma),$*)])' -c constraints.txt
	@touch $@

demo: $(FOR_DEMO)
	$(PY) -m neo.data.prepare --demo --out=data/demo
	$(PY) -m neo.train --config=configs/neo_demo.py

# The second Python: a newer one that really runs, unless PYTHON was given. The newest JAX is tested with 3.12.
ifeq ($(GIVEN),undefined)
SECOND := $(firstword $(foreach p,python3.12 python3.13,$(if $(filter-out $(VERSION),$(call version,$(p))),$(p))))
ifneq ($(VERSION),3.11)
SECOND :=
endif
endif
# Compiling takes most of the tests' time and one core: two processes, each file in one of them.
WORKERS ?= 2
PYTEST := $(PY) -m pytest --durations=20
PARALLEL := $(PYTEST) -n $(WORKERS) --dist=loadfile
SELECT ?=

test: run-tests
ifneq ($(SECOND),)
	$(MAKE) --no-print-directory run-part PYTHON=$(SECOND) EXTRAS= SELECT="$(SELECT)"
endif

test-all:
	$(MAKE) --no-print-directory test SELECT="-m 'slow or not slow'" $(if $(filter undefined,$(GIVEN)),,PYTHON=$(PYTHON))

run-tests: $(FOR_TEST)
	$(PY) -m ruff check .
	$(PARALLEL) tests --ignore=tests/multi_device --ignore=tests/multi_process $(SELECT)
	$(PARALLEL) tests/multi_device $(SELECT)
	$(PYTEST) tests/multi_process $(SELECT)

# What depends on JAX most: kernels, models, sharding, checkpoints, the compiler for TPUs and what reads its programs.
PART := $(wildcard tests/kernels tests/models tests/tpu tests/plan tests/train/test_checkpoint*.py)
run-part: $(FOR_TEST)
	$(PARALLEL) $(PART) $(SELECT)
	$(PARALLEL) tests/multi_device $(SELECT)

# The other files in bench/ are parts of these, or tools.
BENCHES := train_cpu loader prepare attention_cpu attention_tpu_static step_tpu_static attention_gpu train_gpu startup convert
bench: $(FOR_BENCH)
	@# Exit 2 says what this machine lacks (a GPU, libtpu).
	@set -e; for name in $(BENCHES); do echo "== bench/$$name.py"; $(PY) bench/$$name.py || [ $$? = 2 ]; done

clean:
	rm -rf .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
