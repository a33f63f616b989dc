# make demo       set up, fetch model and data, fine-tune a language model with forward passes alone (about four minutes)
# make test       set up, then lint, type-check and run every test that is not slow
# make test-slow  the tests that are
# make sanitize   run the C++ kernels' own tests, and those of the ops, under ASan and UBSan
# make docs       build the documentation, a page for every public object included, into site/index.html
# make gpu        on a machine with an NVIDIA GPU, with torch, Triton, pytest, transformers, rich and tqdm: everything worth knowing
# make neon       cross-compile for aarch64 and compare its bits with this machine's, under an emulator
# All prepare what is missing and are quick the second time.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
KERNELS := $(wildcard csrc/*) setup.py
DEMO_OUTPUT ?= runs/demo
# Eight directions for each of four examples in one forward: what learnt the most from 3,200 example-forwards
# (docs/finetune.md).
DEMO := --batch-size 4 --members 8 --groups 4 --directions 8 --baseline loo --lr 4.8e-4 --steps 80

# Tests start a hundred processes. Where nothing writes bytecode (containers often say so), each compiles torch's and
# transformers' modules anew, which takes longer than all else that an import does.
export PYTHONDONTWRITEBYTECODE =
export PYTHONPYCACHEPREFIX = $(abspath $(VENV))/bytecode

.PHONY: demo test test-slow sanitize sanitize-kernels docs gpu neon lint setup fetch clean
.DELETE_ON_ERROR:

demo: setup fetch
	$(BIN)/pgap-kernels finetune $(DEMO) --compare --overwrite --output $(DEMO_OUTPUT)

# Without the network, tests of the built-in model skip (in CI they fail). One thread for each of the two workers: with
# two each they wait for one another most of the time. Tests of threads ask for theirs.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=30

test: setup lint
	-$(BIN)/pgap-kernels finetune --fetch-only
	$(PYTEST)

# Tests go to the workers one by one ("load" would hand out the longest, which come first, in batches).
test-slow: setup
	-$(BIN)/pgap-kernels finetune --fetch-only
	$(PYTEST) -m slow --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

CPP_TESTS := $(MAKE) --no-print-directory -j 2 -f tests/cpp/Makefile

# The kernels with memory of exact size; then those tests of the ops that name their backend, and what the extension
# refuses, for the code between.
# -g1 is line numbers: full debug information takes four times as long to compile. Python leaks on purpose; it must
# not capture the sanitizers' reports.
SANITIZE := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
OPS := op_properties extension_guards dense masked preconditioned anchor reduction lowrank forward
OPS_TESTS := $(patsubst %,tests/test_%.py,$(OPS))
SANITIZED := $(CPP_TESTS) OUT=build/sanitize FLAGS="$(SANITIZE)"
sanitize: setup sanitize-kernels
	$(SANITIZED) extension PYTHON=$(BIN)/python
	PYTHONPATH=build/sanitize/python:. ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
		$(BIN)/pytest -q -n 2 --capture=sys -k "cpu or guards" $(OPS_TESTS)

# Without torch: CI has them compiled while setup downloads.
sanitize-kernels:
	$(SANITIZED) run

docs: setup
	$(BIN)/properdocs build --strict --quiet

# With that machine's own Python: its torch is built for its GPU.
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

# The same bits on aarch64, emulated, as here.
neon:
	@command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64-static > /dev/null || { \
		echo "make neon needs g++-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static (Debian's names)"; exit 1; }
	$(CPP_TESTS) OUT=build/native
	$(CPP_TESTS) OUT=build/neon FLAGS="-O2 -static" CXX=aarch64-linux-gnu-g++ RUN=qemu-aarch64-static
	diff build/native/result build/neon/result

fetch: setup
	$(BIN)/pgap-kernels finetune --fetch-only

setup: $(VENV)/installed

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# To compile all of torch and transformers to bytecode takes longer than to install them, and most of it is never used.
PIP := $(BIN)/python -m pip install --quiet --no-compile

$(VENV)/requirements: requirements-dev.txt requirements-triton.txt | $(VENV)/created
	$(PIP) --requirement requirements-dev.txt
	$(PIP) --no-deps --requirement requirements-triton.txt
	touch $@

# The oldest versions that are supported lie in folders of their own, which tests put first on the path.
OLDEST := $(VENV)/triton-oldest.installed $(VENV)/transformers-oldest.installed
$(OLDEST): $(VENV)/%.installed: requirements-%.txt | $(VENV)/created
	$(PIP) --no-deps --upgrade --target $(VENV)/$* --requirement $<
	touch $@

# Built against the torch just installed; editable, so that only a change of the C++ side builds again.
$(VENV)/installed: $(VENV)/requirements $(OLDEST) $(KERNELS) pyproject.toml
	PGAP_FORCE_BUILD=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build runs site *.egg-info pgap_kernels/*.so
