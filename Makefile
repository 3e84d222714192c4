# Everything runs in a virtual environment of its own, .venv, which the first target that needs it makes.

PYTHON ?= python3
PORT ?= 8000
MINUTES ?= 10
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MUTATION := $(VENV)/.mutation
DEMO := demo-output
MODEL := s2_vllm/demo/model

DEVICE := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)

# torch.compile needs a C++ compiler on the CPU, and vLLM would claim most of the machine's memory.
SERVE_FLAGS_cpu := --dtype float32 --enforce-eager --kv-cache-memory-bytes 512M
SERVE_FLAGS_cuda :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak mutants serve lint clean

help:
	@echo "make setup   make $(VENV) with vLLM ($(DEVICE)), this plugin and what its tests need"
	@echo "make demo    hide pass keys in a long document and ask a small trained model for them"
	@echo "make test    run the tests; those that need a GPU are skipped without one (WORKERS=... processes)"
	@echo "make mutants change the code in small ways: do the tests notice? (MODULES=s2_vllm.plan ...)"
	@echo "make soak    put a real server under hostile traffic for $(MINUTES) minutes (MINUTES=...)"
	@echo "make serve   serve the demo's model with 'vllm serve' on port $(PORT) (PORT=...)"
	@echo "make lint    run ruff and mypy"
	@echo "make clean   remove $(VENV) and everything that was made"

setup: $(READY)

$(READY): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] < (3, 14); \
	    sys.exit(0 if ok else "$(PYTHON) is Python %d.%d; 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 ..." \
	    % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
ifeq ($(DEVICE),cpu)
	@# It needs torch's CPU build: PIP_EXTRA_INDEX_URL can name an index that has it.
	$(BIN)/pip install -e '.[cpu,test]'
	@# Their CUDA builds come along and break `import transformers` beside a CPU build of torch.
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
	    $(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec; fi
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null \
	    || { echo "vLLM's CPU build needs libnuma.so.1 (Debian and Ubuntu: apt-get install libnuma1)"; exit 1; }
else
	$(BIN)/pip install -e '.[cuda,test]'
endif
	@touch $@

demo: $(READY)
	$(BIN)/python -m s2_vllm.demo --output $(DEMO)

# A worker has a core: threads of several would be in each other's way. It takes whole files, for their fixtures.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

$(MUTATION): $(READY)
	$(BIN)/pip install -e '.[mutation]'
	@touch $@

mutants: $(MUTATION)
	$(BIN)/python -m tests.mutation $(MODULES)

soak: $(READY)
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

serve: $(READY)
	HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 $(BIN)/vllm serve $(MODEL) $(SERVE_FLAGS_$(DEVICE)) \
	    --served-model-name s2-demo --host 127.0.0.1 --port $(PORT) --max-model-len 32768

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
