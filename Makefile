# Everlong's front door. Each target does what it needs first, and does it again only when something changed.
#   PRESET=release|debug|asan|cuda   which build (CMakePresets.json)      JOBS=N   parallel compile jobs
#   EVERLONG_CUDA=AUTO|ON|OFF        CUDA kernels                         UNITY=ON|OFF   batched torch files
#   ARGS="..."                       arguments of `make demo` and `make bench`
PRESET ?= release
BUILD := build/$(PRESET)
EVERLONG_CUDA ?= AUTO
UNITY ?= ON
# A torch file takes up to 2.5 GB while it compiles.
JOBS ?= $(shell awk -v cores="$$(nproc)" '/^MemAvailable/ { n = int($$2 / 2500000); print n < 1 ? 1 : n < cores ? n : cores }' /proc/meminfo)
CUDA_CHOICE := $(if $(filter cuda asan,$(PRESET)),,-DEVERLONG_CUDA=$(EVERLONG_CUDA))
CONFIGURE := cmake --preset $(PRESET) $(CUDA_CHOICE) $(if $(LIBTORCH_ROOT),-DLIBTORCH_ROOT=$(LIBTORCH_ROOT))

.DEFAULT_GOAL := help
.PHONY: help setup configure build install test demo bench torch-library interop fuzz thread-check format lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@sed -n 's/^#   /  /p' Makefile

setup: ## install Debian packages and LibTorch (asks for sudo if needed); quick when all is there
	@tools/setup --quiet

# Anew when the choices differ from the last time; a changed CMakeLists.txt is ninja's business.
configure: setup
	@first=; if [ ! -f $(BUILD)/build.ninja ]; then first="-DEVERLONG_UNITY=$(UNITY)"; fi; \
	if [ "$$(cat $(BUILD)/choices 2>/dev/null)" != "$(CONFIGURE)" ] || [ ! -f $(BUILD)/build.ninja ]; then \
	  $(CONFIGURE) $$first && echo "$(CONFIGURE)" > $(BUILD)/choices; fi

build: configure ## the programs, in build/release/bin
	@cmake --build $(BUILD) -j $(JOBS) --target programs

test: configure ## everything, then all tests but the slow and the GPU ones
	@cmake --build $(BUILD) -j $(JOBS)
	@ctest --preset $(PRESET)

demo: build ## the tour: what the engine does, on this machine
	@tools/demo $(ARGS)

bench: build ## every operator on the CPU beside its baselines; ARGS="--help" lists the choices
	@bench/operators $(ARGS)

torch-library: configure ## build/release/lib/libeverlong_torch.so: the operators for torch.ops.load_library
	@cmake --build $(BUILD) -j $(JOBS) --target everlong_torch_ops

install: build ## program, library, headers and CMake package into PREFIX (default /usr/local)
	@cmake --build $(BUILD) -j $(JOBS) --target everlong_shared
	@cmake --install $(BUILD) --prefix $(or $(PREFIX),/usr/local)

fuzz: ## readers of files under any bytes, with clang's libFuzzer; ARGS="--help" lists the choices
	@tools/fuzz $(ARGS)

thread-check: ## tests that start threads, under ThreadSanitizer
	@tools/thread_check

interop: build ## what transformers makes of our model folders; downloads 3 GB into build/interop
	@tools/interop $(BUILD)/bin/everlong

format: setup ## format all sources in place
	@tools/check_format --fix

lint: configure ## formatting, layers, clang-tidy
	@tools/check_format
	@tools/check_layers
	@tools/check_tidy --build $(BUILD)

clean: ## remove build/ (the downloaded LibTorch in .venv stays)
	@rm -rf build
