# make demo, make test: all the set-up on a fresh machine, then the demonstration or every test. Running either again
# downloads and compiles only what has changed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := $(CURDIR)/.venv
STAMPS := .venv/build
PACKAGE := python/torch_divergence
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
export PATH := $(VENV)/bin:$(PATH)
# The CUDA kernels are built into the library with `make TD_CUDA=ON ...`; the tests run their source on an emulator.
TD_CUDA ?= OFF
# Kernels that this processor cannot run take minutes to compile; `pip install` from a fresh tree builds them.
TD_AVX512 ?= $(if $(shell grep -m1 -w avx512bw /proc/cpuinfo),ON,OFF)
CONFIGURE := cmake -S . -G Ninja -U 'LibTorch_*' -DPython3_EXECUTABLE=$(VENV)/bin/python -DTD_PYTHON=ON -DTD_TESTS=ON \
  -DTD_CUDA=$(TD_CUDA) -DTD_AVX512=$(TD_AVX512)
# With ccache, a clean clone compiles what no clone before it has: paths are taken relative to the clone.
ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER := ccache
export CMAKE_CUDA_COMPILER_LAUNCHER := ccache
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
endif
# A process a core; threads that wait for work leave the core to the others.
PYTEST := OMP_WAIT_POLICY=passive pytest -n $(JOBS) --dist worksteal
CXX_FILES = $(shell find csrc tests examples benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2> /dev/null)
, := ,
say = @printf '\n== %s\n' "$(1)"

.PHONY: help demo test build lint ctest pytest pytest-capabilities test-cuda mypy test-ptx static-gate static-gate-quick mutants mutants-sample install-test docs compat compat-quick sanitize sanitize-quick bench format tidy clean

help:
	@echo "make demo       train a student with knowledge distillation, in Python and in C++"
	@echo "make test       every test, in both languages"
	@echo "make build      compile, and install the package into .venv as editable"
	@echo "make docs       the guide, into build/docs"
	@echo "make test-cuda  the CUDA kernels, on an emulated GPU"
	@echo "make lint       formatting, ruff, mypy        make format    format everything"
	@echo "make sanitize   tests with AddressSanitizer and UndefinedBehaviorSanitizer (sanitize-quick: of kl_div, in C++)"
	@echo "make compat     compile with the headers of every supported torch (compat-quick: the oldest, core/ only)"
	@echo "make bench      benchmarks                    make tidy      clang-tidy"
	@echo "make mutants    break the CUDA kernels on purpose: every seeded bug must be caught"
	@echo "make clean      remove what was built; .venv stays"

demo: build
	$(call say,distillation in Python)
	python examples/python/distillation.py --picture build/distillation.png
	$(call say,distillation in C++)
	build/examples/distillation
	$(call say,KL$(,) JS and Wasserstein compared)
	python -m torch_divergence --picture build/comparison.png
	@echo; echo "more (docs/examples.md), in Python and in C++: policy_optimization, vae, gan, wgan;"; \
	echo "in Python: domain_alignment, gradient_flow, colour_transfer"

test: lint ctest pytest pytest-capabilities test-cuda test-ptx static-gate-quick install-test docs
	$(call say,all tests passed)

# --- set-up and build -------------------------------------------------------------------------------------------------

$(STAMPS)/tools:
	@missing() { echo "$$1 is missing: install it with '$$2'" >&2; exit 1; }; \
	python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || missing "Python 3.10 or newer with venv" "apt-get install python3-venv"; \
	command -v c++ > /dev/null || missing "a C++20 compiler" "apt-get install g++"; \
	command -v cmake > /dev/null || missing "CMake 3.25 or newer" "apt-get install cmake"
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/venv: requirements-dev.txt | $(STAMPS)/tools
	$(call say,Python packages into .venv)
	python3 -m venv .venv
	python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

build/configured: $(STAMPS)/venv
	$(call say,configuration)
	$(CONFIGURE) -B build -DTD_EXAMPLES=ON -DTD_WERROR=ON
	@touch $@

# CMake knows what is out of date.
build: build/configured
	$(call say,build)
	cmake --build build --parallel $(JOBS)
	@cmake --install build --prefix $(PACKAGE) > build/install.log
	@cmake --install build --prefix $(PACKAGE) --component python >> build/install.log
	@$(MAKE) $(STAMPS)/editable

$(STAMPS)/editable: setup.py pyproject.toml $(STAMPS)/venv
	pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# --- tests ------------------------------------------------------------------------------------------------------------

lint: mypy
	$(call say,formatting and lint)
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)

mypy: $(STAMPS)/venv
	$(call say,types)
	mypy

ctest: build
	$(call say,C++ tests$(,) for each instruction set)
	ctest --test-dir build --output-on-failure --no-tests=error -LE cuda -j $(JOBS)

pytest: build
	$(call say,Python tests and doctests)
	$(PYTEST) --ignore tests/cuda

# pytest itself runs with the best instruction set of the processor; these are the ones below it.
pytest-capabilities: build
	@best=$$(python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())'); \
	for capability in default avx2; do \
	  case $$best-$$capability in DEFAULT-*|AVX2-avx2) continue;; esac; \
	  printf '\n== Python tests with ATEN_CPU_CAPABILITY=%s\n' $$capability; \
	  ATEN_CPU_CAPABILITY=$$capability $(PYTEST) -q tests/test_values.py tests/test_gradients.py; \
	done

# The CUDA kernels' source on the emulated device of tests/cuda/emulator, in place of the CPU's, for the tests of the
# operators too: all of their values and derivatives but what takes minutes there (large rows, many of them).
EMULATED := build/emulated/site
EMULATED_TESTS := test_reference_file or test_mpmath or test_dtypes or peaked or far_apart or masked or test_row_weight or \
  test_first_order or test_derivatives_at_masks or test_mixed_dtypes or test_hessian or test_through_weights
EMULATED_OWN_TESTS := test_mpmath or test_zeros or test_row_weight or not_a_distribution or ignored_rows or weight_zero or \
  left_out or masked_classes or no_distribution or zero_targets or both_sides or near_the_optimum or double_backward_against
# Losses with a file of tests of their own: all but what is another composition of operators, checks arguments only, or
# expects the ValueErrors of the CPU kernels, where a device has assertions, its stored gradients or its order of summation.
EMULATED_FILES := $(foreach loss,fisher_vector_product gaussian_kl kl_div_topk,tests/test_$(loss).py)
NOT_EMULATED := test_full or value_and_grad or padding_is_dropped or opcheck or test_bad_input or test_errors or test_negative_weight or test_modules or threads
test-cuda: build
	$(call say,CUDA kernels on an emulated device)
	ctest --test-dir build --output-on-failure --no-tests=error -L cuda -j $(JOBS)
	cmake --build build --parallel $(JOBS) --target torch_divergence_emulated
	rm -rf $(EMULATED) && mkdir -p $(EMULATED)/torch_divergence/lib
	cp -r $(PACKAGE)/*.py $(PACKAGE)/functional $(PACKAGE)/modules $(EMULATED)/torch_divergence
	cmake --install build --prefix $(EMULATED)/torch_divergence --component python > build/install.log
	cp build/emulated/libtorch_divergence.so $(EMULATED)/torch_divergence/lib
	export PYTHONPATH=$(CURDIR)/$(EMULATED); \
	python -c "import torch_divergence as td; assert 'emulated' in td.__file__, td.__file__"; \
	$(PYTEST) -q tests/test_values.py tests/test_gradients.py -k "(kl_div or js_div) and ($(EMULATED_TESTS))"; \
	$(PYTEST) -q $(EMULATED_FILES) -m "not slow" -k "not ($(NOT_EMULATED))"; \
	$(PYTEST) -q tests/test_cross_entropy.py tests/test_entropy.py -k "$(EMULATED_OWN_TESTS)"

# docs/cuda.md tells what each of these shows. The first two skip, with a reason, where there is no nvcc (or no
# cuobjdump); the last needs g++ only.
test-ptx: $(STAMPS)/venv
	$(call say,CUDA kernels as nvcc compiles them$(,) interpreted)
	pytest -q tests/cuda/ptx

static-gate static-gate-quick: $(STAMPS)/venv
	$(call say,machine code of the CUDA kernels)
	python tests/cuda/static_report.py $(if $(filter static-gate-quick,$@),--quick)

mutants mutants-sample: $(STAMPS)/venv
	$(call say,CUDA kernels with seeded bugs)
	python tests/cuda/mutants.py $(if $(filter mutants-sample,$@),--sample 3)

# The same C++ project against a CMake install and against a wheel unpacked beside torch, as pip would.
INSTALL := $(CURDIR)/build/install-test
install-test: build
	$(call say,C++ project with the library installed by CMake)
	rm -rf $(INSTALL)
	cmake --install build --prefix $(INSTALL)/cmake > build/install.log
	tests/install/run.sh $(INSTALL)/cmake $(INSTALL)/cmake-user
	$(call say,C++ project with the library installed as a wheel)
	pip wheel --disable-pip-version-check --no-build-isolation --no-deps -q -w $(INSTALL) .
	pip install --disable-pip-version-check --no-deps -q --target $(INSTALL)/site $(INSTALL)/*.whl
	ln -s "$$(python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')" $(INSTALL)/site/torch
	ldd $(INSTALL)/site/torch_divergence/lib/libtorch_divergence.so | grep -q $(INSTALL)/site/torch_divergence/lib/../../torch/lib/libtorch_cpu.so
	tests/install/run.sh $(INSTALL)/site/torch_divergence $(INSTALL)/wheel-user
	cd $(INSTALL) && PYTHONPATH=site python -c "import torch, torch_divergence as td; \
	  assert td.__file__.startswith('$(INSTALL)'), td.__file__; \
	  td.kl_div(torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)).backward()"

# Warnings are errors: a dead link, an unknown name, an argument without a description. It reads the source, no build.
docs: $(STAMPS)/venv
	$(call say,guide and reference)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo "open build/docs/index.html"

compat compat-quick: build/configured
	$(call say,headers of other versions of torch)
	python .ci/torch_headers.py build/compile_commands.json .venv/torch-headers $(if $(filter compat-quick,$@),--quick)

# The kernels stay optimised enough to be quick; asserts are on. Leaks are looked for in C++ only: Python has its own.
# Of the instruction sets it is AVX2 that is looked at (cmake/CpuKernels.cmake). sanitize-quick, which CI runs, looks at
# kl_div: the row machinery, its kernels, autograd, threads; sanitize at everything, in an hour of processor time.
sanitize sanitize-quick: export ATEN_CPU_CAPABILITY := $(if $(shell grep -m1 -w avx2 /proc/cpuinfo),avx2,default)
SANITIZED := $(CONFIGURE) -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 -DTD_SANITIZE=address,undefined
SANITIZED_TESTS := test_kl_div test_kernels test_threads
sanitize-quick: $(STAMPS)/venv
	$(call say,C++ tests of kl_div with sanitizers)
	$(SANITIZED) -B build-sanitize-quick -DTD_ONLY=kl_div
	cmake --build build-sanitize-quick --parallel $(JOBS) --target $(SANITIZED_TESTS)
	cd build-sanitize-quick && for test in $(SANITIZED_TESTS); do tests/$$test --gtest_brief=1; done

sanitize: $(STAMPS)/venv
	$(call say,build with sanitizers)
	$(SANITIZED) -B build-sanitize
	cmake --build build-sanitize --parallel $(JOBS)
	$(call say,C++ tests with sanitizers)
	ctest --test-dir build-sanitize --output-on-failure --no-tests=error -j $(JOBS)
	$(call say,Python tests with sanitizers)
	rm -rf build-sanitize/site && mkdir -p build-sanitize/site/torch_divergence
	cp -r $(PACKAGE)/*.py $(PACKAGE)/functional $(PACKAGE)/modules build-sanitize/site/torch_divergence
	cmake --install build-sanitize --prefix build-sanitize/site/torch_divergence > build-sanitize/install.log
	cmake --install build-sanitize --prefix build-sanitize/site/torch_divergence --component python >> build-sanitize/install.log
	export LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(CURDIR)/build-sanitize/site; \
	python -c "import torch_divergence as td; assert 'build-sanitize' in td.__file__, td.__file__"; \
	$(PYTEST) -q tests/test_gradients.py

# --- for developers ---------------------------------------------------------------------------------------------------

bench: build
	python benchmarks/kl_div.py
	python benchmarks/divergences.py
	python benchmarks/sinkhorn.py

format: $(STAMPS)/venv
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

tidy: build
	clang-tidy -p build --quiet $$(find csrc -name '*.cpp')

clean:
	rm -rf build build-sanitize build-sanitize-quick *.egg-info python/*.egg-info $(STAMPS)/editable
	rm -rf $(PACKAGE)/_build_info.py $(PACKAGE)/*.so $(PACKAGE)/include $(PACKAGE)/lib $(PACKAGE)/share
