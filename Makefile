# Every target first makes .venv with what pyproject.toml declares.
PYTHON ?= python3
BIN := .venv/bin
# Tests run in as many processes, each with one thread; a process takes about 3 GB.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-slow lint format bench clean

demo: .venv/.installed
	$(BIN)/swamp-fast demo --out swamp_demo

test: .venv/.installed
	$(PYTEST)

# In one process with all threads: one test of the slow tier fails with a single thread.
test-slow: .venv/.installed
	$(BIN)/python -m pytest --slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file= --ignore-missing-imports kernels

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# With CIFAR10=cifar10.npz, whole runs too.
bench: .venv/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=min,median,max,rounds
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.agreement
	$(BIN)/python -m benchmarks.layer
	$(BIN)/python -m benchmarks.fused step
	$(BIN)/python -m benchmarks.fused step --precision bfloat16
	$(BIN)/python -m benchmarks.fused step --model vgg13 --no-compile --no-vmap
	$(BIN)/python -m benchmarks.fused step --model mlp
	$(BIN)/python -m benchmarks.fused figure
	$(BIN)/python -m benchmarks.durability kills
	$(BIN)/python -m benchmarks.durability cost
	$(BIN)/python -m benchmarks.sweeps --rounds 3
	$(BIN)/python -m benchmarks.analysis
	$(BIN)/python -m benchmarks.ranks --samples 512 --epochs 8 --cycles 0 --repeats 4
	$(if $(CIFAR10),$(BIN)/python -m benchmarks.fused run --data $(CIFAR10))
	$(if $(CIFAR10),$(BIN)/python -m benchmarks.fused run --data $(CIFAR10) --precision bfloat16)

.venv/.installed: pyproject.toml setup.py MANIFEST.in $(wildcard csrc/cpu/* csrc/cpu/fused/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[data,report,dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info swamp_fast/*.so
