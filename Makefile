# Each target sets up what it needs in .venv, once: `make locate` the package alone, `make test` everything.
# Needs Python >= 3.11 (choose one with PYTHON=...), a C++17 compiler and make; pip brings CMake and Ninja.
PYTHON ?= python3
PHOTO ?= $(firstword $(sort $(wildcard tests/data/photos/*.jpg)))
VENV ?= .venv
DIST ?= dist

BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard kernels/cpu/* kernels/cuda/*)

.PHONY: locate test lint readme page wheel sanitize clean

locate: $(VENV)/base.stamp
	@$(VENV)/bin/geoengine locate --demo '$(PHOTO)'

test: $(VENV)/test.stamp
	$(VENV)/bin/pytest

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Puts the figures of bench/results into the README and the report of all machines, bench/results/README.md.
readme: $(VENV)/test.stamp
	$(VENV)/bin/python -m geoengine.bench.readme

# Builds the service's web page; what it writes is committed. Needs Node 20 and npm.
page:
	cd geoengine/service/web && npm ci --no-audit --no-fund && npm run build

wheel: $(VENV)/bin/python
	$(VENV)/bin/pip wheel --no-deps --wheel-dir $(DIST) .

# The kernel tests over CPU kernels that watch every access and every undefined operation, or, with SANITIZE=thread,
# every race. Left out: the test that limits its own memory. Leaks are not looked for, since Python's hide ours.
# The C++ library must be there before the extension for exceptions to pass.
SANITIZE ?= address,undefined
SANITIZED := build/sanitize
RUNTIME = lib$(if $(findstring thread,$(SANITIZE)),t,a)san.so
sanitize: $(VENV)/test.stamp
	$(VENV)/bin/pip install --quiet cmake 'pybind11>=2.13'
	$(VENV)/bin/cmake -S . -B $(SANITIZED) -DCMAKE_BUILD_TYPE=Release -DGEOENGINE_CUDA=OFF \
	  -DGEOENGINE_SANITIZE=$(SANITIZE) -DSKBUILD_PROJECT_NAME=geoengine -DSKBUILD_PROJECT_VERSION=0 \
	  -DPython_EXECUTABLE=$(abspath $(VENV)/bin/python) -Dpybind11_DIR="$$($(VENV)/bin/python -m pybind11 --cmakedir)"
	$(VENV)/bin/cmake --build $(SANITIZED) --parallel
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=$(RUNTIME)) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 PYTHONPATH=tests \
	  GEOENGINE_SANITIZED="$$(ls $(SANITIZED)/_topk_cpu*.so)" $(VENV)/bin/python -m pytest -s -p sanitizer \
	  tests/test_kernels.py tests/test_kernels_[d-z]*.py -k 'not system_refuses_more_threads'

clean:
	rm -rf $(VENV) $(DIST) .mypy_cache .pytest_cache .ruff_cache

$(VENV)/base.stamp: $(BUILD_INPUTS) | $(VENV)/bin/python
	$(VENV)/bin/pip install --editable .
	@touch $@

# The test extra's environment serves the base targets too.
$(VENV)/test.stamp: $(BUILD_INPUTS) | $(VENV)/bin/python
	$(VENV)/bin/pip install --editable '.[export,test]'
	@touch $(VENV)/base.stamp $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'geoengine needs Python 3.11 or newer: name one that is installed, as in make PYTHON=python3.12' >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null \
	  || { echo 'geoengine needs a C++17 compiler: install one, such as g++, or name it, as in make CXX=clang++' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
