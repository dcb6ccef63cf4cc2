# Every target sets up what it needs: a virtual environment, the dependencies, the native library.
# PYTHON chooses the interpreter, VENV the environment's folder, WORKERS how many processes test, PYTEST_ARGS what else pytest gets,
# DEVICE whose library is built,
# SUITE_ARGS what the GPU suite gets, SERVE_ARGS what the server gets, JOBS how many models the zoo runs at a time, TORCH which releases of torch the matrix runs,
# SUBSET=n one in n of the matrix's cases.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
DEVICE ?= cpu
SUITE_ARGS ?=
SERVE_ARGS ?=
JOBS ?= 2
TORCH ?=
SUBSET ?= 1
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo serve test test-gpu test-emulated test-matrix bench build lint format asan docs zoo clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "fi_ops: installing torch and the test dependencies into $(VENV) ..."
	$(PIP) torch ninja setuptools
	$(PIP) --no-build-isolation --no-deps -e .
	$(PIP) "torch>=2.11" ninja "pytest>=8" pytest-xdist "expecttest>=0.2" "transformers>=5" "hypothesis>=6" numpy
	@touch $@

$(VENV)/.lint-ready: $(VENV)/.ready
	$(PIP) "ruff>=0.9" "mypy>=1.13" "clang-format>=18"
	@touch $@

build: $(VENV)/.ready        ## build the CPU library ahead of time (a no-op when nothing changed); DEVICE=cuda or all
	$(PY) -m fi_ops.build --device $(DEVICE)

demo: build                  ## the main job: a real checkpoint, stock torch.compile against fi_ops
	$(PY) examples/demo.py

serve: build                 ## a continuous-batching server of the demo model (SERVE_ARGS: see examples/serve.py --help)
	$(PY) examples/serve.py $(SERVE_ARGS)

test: build                  ## the whole suite; without a GPU, CUDA code is compiled (where nvcc is) and emulated
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-gpu: $(VENV)/.ready     ## on a machine with a GPU: its tests, memcheck and racecheck (SUITE_ARGS: see bench/gpu_suite.py)
	$(PY) -m fi_ops.build --device all
	$(PY) bench/gpu_suite.py --stages tests,sanitize $(SUITE_ARGS)

# What runs attention on a GPU.
EMULATED_TESTS := $(patsubst %,tests/test_%.py,hopper_kernels mla_cuda fp8_attention fp8_batch_attention batch_prefill_cuda batch_masks \
  many_query_rows few_query_rows few_rows_of_a_batch batch_attention)

test-emulated: $(VENV)/.ready ## without a GPU: the sweep's and the GPU tests' attention in the emulator, on Hopper's kernels (an hour or two)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal --emulate-cuda=sm90 tests/test_every_op.py -k "numerics and attention" $(PYTEST_ARGS)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal --emulate-cuda=sm90 -m gpu $(EMULATED_TESTS) $(PYTEST_ARGS)

test-matrix:                 ## the rewrite tests and the op sweep under torch 2.11 to 2.15 (or TORCH="2.11.0 2.15.0"), each in its own .venvs/; SUBSET=6: a sixth
	$(PYTHON) tests/run_torch_versions.py $(TORCH) --one-in=$(SUBSET) --pytest-args="$(PYTEST_ARGS)"

lint: $(VENV)/.lint-ready    ## ruff, types, C++ format
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'fi_ops/csrc/*.h' 'fi_ops/csrc/*.cpp' 'fi_ops/csrc/*.cu')

format: $(VENV)/.lint-ready  ## rewrite the sources in the house format
	$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'fi_ops/csrc/*.h' 'fi_ops/csrc/*.cpp' 'fi_ops/csrc/*.cu')

asan: $(VENV)/.ready         ## the op sweep on an AddressSanitizer + UBSan build of the CPU library
	FI_OPS_SANITIZE=address,undefined $(PY) -m fi_ops.build --device cpu
	$(PY) tests/run_sanitized.py

bench: build                 ## all benches, short form (see python -m bench --help)
	$(PY) -m bench all

docs: build                  ## regenerate the generated parts of README.md
	$(PY) -m fi_ops.library.matrix --write README.md

zoo: build                   ## run the whole model zoo (about half an hour): tests/zoo/golden.jsonl and docs/zoo.md
	PYTHONPATH=tests $(PY) -m zoo.table --run --jobs $(JOBS)

clean:
	rm -rf $(VENV) .venvs build dist *.egg-info
