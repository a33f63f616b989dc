# make demo       set up, fetch model and data, fine-tune a language model with forward passes alone (about ten minutes)
# make test       set up, then lint, type-check and run every test
# make sanitize   run the C++ kernels' own tests under AddressSanitizer and UndefinedBehaviorSanitizer
# All prepare what is missing and are quick the second time.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
KERNELS := $(wildcard csrc/*) setup.py
DEMO_OUTPUT ?= runs/demo

.PHONY: demo test sanitize lint setup fetch clean
.DELETE_ON_ERROR:

demo: setup fetch
	$(BIN)/pgap-kernels finetune --baseline --output $(DEMO_OUTPUT)

# Without the network, tests of the built-in model skip (in CI they fail).
test: setup lint
	-$(BIN)/pgap-kernels finetune --fetch-only
	$(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# -g1 is line numbers; full debug information would take four times as long to compile.
SANITIZE := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize:
	$(MAKE) --no-print-directory -j 2 -f tests/cpp/Makefile OUT=build/sanitize FLAGS="$(SANITIZE)"

fetch: setup
	$(BIN)/pgap-kernels finetune --fetch-only

setup: $(VENV)/installed

$(VENV)/requirements: requirements-dev.txt requirements-triton.txt requirements-triton-oldest.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-triton.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/triton-oldest \
		--requirement requirements-triton-oldest.txt
	touch $@

# Built against the torch just installed; editable, so that only a change of the C++ side builds again.
$(VENV)/installed: $(VENV)/requirements $(KERNELS) pyproject.toml
	PGAP_FORCE_BUILD=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info pgap_kernels/*.so
