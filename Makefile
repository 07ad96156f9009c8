# Every target sets up what it needs in .venv, once. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One file for each group of packages; it is made when they are installed.
DEMO := $(VENV)/.ready-demo
RELEASE := $(VENV)/.ready-release
READY := $(VENV)/.ready
RTX := $(VENV)/.ready-rtx
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
TRITON := $(VENV)/.ready-triton

# What `make export` and `make bench` work on.
MODEL ?= same-s
WEIGHTS ?= hub
PRECISION ?= fp32
TENSORRT ?= auto
OUT ?= engines
COMMA := ,
# Lengths that `make bench` measures, by commas; by default those of benchmarks/latency.py.
LATENTS ?=
# Address of the repository that the links on PyPI lead to, such as https://github.com/OWNER/samekit.
REPOSITORY ?=
# Where an export of MODEL lies: folders keep their name, repositories of the hub are written small.
NAME = $(notdir $(patsubst %/,%,$(MODEL)))
ENGINE = $(OUT)/$(if $(wildcard $(MODEL)),$(NAME),$(shell echo '$(NAME)' | tr A-Z a-z))

.DEFAULT_GOAL := help
.PHONY: help setup demo export bench gpu-check test test-slow test-min test-webgpu lint format docs wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo "  variables: MODEL=same-s|same-l|same-tiny|DIR  WEIGHTS=hub|random|DIR  PRECISION=fp32,...  TENSORRT=auto|rtx|off  OUT=engines  LATENTS=32,128  REPOSITORY=URL  PYTHON=python3"

setup: $(READY) ## make .venv with everything in it

# What the demo, exports and `make bench` need. PyPI's torch brings gigabytes of CUDA libraries on Linux;
# PIP_EXTRA_INDEX_URL can point at a CPU build instead.
$(DEMO): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "samekit needs Python >= 3.11; pass PYTHON=..."; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "cannot make $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 2; }
	@echo "installing PyTorch and ONNX Runtime into $(VENV): 1.2 GB with a CPU build of PyTorch, else 4.9 GB; some minutes"
	$(INSTALL) '.[cpu,export,report]'
	@touch $@

$(RELEASE): $(DEMO)
	$(INSTALL) '.[release]'
	@touch $@

# What tests and checks need besides: Ray, clients, development tools.
$(READY): $(DEMO)
	@echo "installing Ray and development tools into $(VENV): 1.4 GB"
	$(INSTALL) '.[ray,serve,triton,av,openvino,dev,release]'
	@touch $@

# TensorRT's compiler, 220 MB: it builds engines without a GPU, so every test run puts the graphs through it.
$(RTX): $(READY)
	$(INSTALL) '.[rtx]'
	@touch $@

# A real Triton server, 57 MB, for slow tests; it is installed alone, because the package asks for NumPy 1.
$(TRITON): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		nvidia-pytriton && touch $@ || echo "nvidia-pytriton is not installed: the tests that need it are skipped"

demo: $(DEMO) ## export same-tiny, encode and decode music with it, write demo/report.html
	$(BIN)/python -u tools/demo.py

export: $(DEMO) ## write an engine folder: MODEL, WEIGHTS, PRECISION, TENSORRT, OUT
	$(BIN)/samekit export $(MODEL) --weights $(WEIGHTS) --precision $(PRECISION) --tensorrt $(TENSORRT) --out $(OUT)

YARDSTICKS := --yardstick 'compiled fp32' --yardstick 'torch bf16'

# On a GPU: TensorRT engines, batches of 1 and 8, and the lengths of the published table of the reference's port.
ON_GPU = $(shell command -v nvidia-smi)

bench: $(DEMO) ## measure against eager PyTorch: MODEL, WEIGHTS, PRECISION, OUT, LATENTS; ARGS for benchmarks/latency.py
	$(BIN)/samekit export $(MODEL) --weights $(WEIGHTS) --precision $(PRECISION) --out $(OUT) \
		--tensorrt $(if $(ON_GPU),$(TENSORRT),off)
	mkdir -p build
	$(BIN)/python benchmarks/latency.py $(ENGINE) --precision $(PRECISION) $(YARDSTICKS) \
		$(if $(ON_GPU),--batches 1$(COMMA)8) $(if $(LATENTS),--latents $(LATENTS)) \
		--plot build/$(notdir $(ENGINE))-latency.png $(ARGS)
	$(BIN)/python benchmarks/opening.py $(ENGINE) --precision $(firstword $(subst $(COMMA), ,$(PRECISION)))

# TensorRT and the GPU build of ONNX Runtime are used if they are installed: pip install 'samekit[gpu]'.
gpu-check: $(READY) ## test, measure and check on this machine's GPU, in at most 25 minutes; ARGS for benchmarks/gpu_check.py
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

# Per cent of the lines of each package that the tests must run; without those that need a GPU, see pyproject.toml.
COVERED := 90

# Two processes of 2 GB, a file of tests at a time. One that dies ends the run: another would begin with the same test.
WORKERS := --numprocesses 2 --dist loadfile --max-worker-restart 0

test: $(READY) $(RTX) ## run every test but the slow ones, and say which lines they ran; with ARGS those tests alone
ifdef ARGS
	$(BIN)/python -m pytest -m "not slow" $(ARGS)
else
	$(BIN)/python -m pytest -m "not slow" $(WORKERS) --cov --cov-report=
	$(BIN)/coverage report --include 'runtime/*' --fail-under $(COVERED)
	$(BIN)/coverage report --include 'export/*' --fail-under $(COVERED)
endif

test-slow: $(READY) $(RTX) $(TRITON) ## run the tests that need minutes or gigabytes
	$(BIN)/python -m pytest -m slow $(ARGS)

# The lowest version of every package that pyproject.toml allows for these extras, and the tools of the tests as pinned.
# diffusers needs a newer huggingface-hub. TORCH_MIN=2.13.0 tests with another PyTorch, such as one that needs no
# download.
MIN := .venv-min
TORCH_MIN ?= 2.9.0
MIN_TOOLS := build twine hatchling pytest pytest-xdist hypothesis psutil pdoc mkdocs mkdocs-material

test-min: ## run every test but the slow ones with the lowest versions of the packages; TORCH_MIN=2.9.0
	$(PYTHON) -m venv --clear $(MIN)
	grep -vE '^(dev|requires) = ' pyproject.toml | grep -oE '"[a-zA-Z0-9_.-]+(\[[a-z]+\])?>=[0-9.]+"' | tr -d '"' \
		| sed -E 's/\[[a-z]+\]//; s/>=/==/; s/^torch==.*/torch==$(TORCH_MIN)/' > $(MIN)/constraints.txt
	for tool in $(MIN_TOOLS); do grep "^$$tool==" constraints.txt; done >> $(MIN)/constraints.txt
	$(MIN)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(MIN)/constraints.txt \
		--editable '.[cpu,export,report,ray,serve,triton,av,tags]' $(MIN_TOOLS)
	$(MIN)/bin/python -m pytest -m "not slow" $(WORKERS) --ignore tests/test_diffusers.py $(ARGS)

# Packages that are put before those of .venv: WebGPU as a plugin of ONNX Runtime, and a build of ONNX Runtime with it.
WEBGPU := build/webgpu
WITH_WEBGPU = PYTHONPATH=$(CURDIR)/$(WEBGPU)
WEBGPU_TEST = $(BIN)/python tools/with_vulkan.py $(WEBGPU)/driver $(BIN)/python -m pytest -m "webgpu and not slow"

$(WEBGPU)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		--upgrade --target $(WEBGPU)/plugin onnxruntime-ep-webgpu
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		--upgrade --target $(WEBGPU)/build onnxruntime-webgpu
	@touch $@

test-webgpu: $(WEBGPU)/.ready ## run the contract of backends and the golden cases in WebGPU, without a GPU if there is none
	$(WITH_WEBGPU)/plugin $(WEBGPU_TEST) tests/test_golden.py tests/test_backends.py tests/test_webgpu.py \
		tests/test_gpu_check.py $(ARGS)
	$(WITH_WEBGPU)/build $(WEBGPU_TEST) tests/test_webgpu.py $(ARGS)

DOCUMENTS := $(wildcard *.md docs/*.md benchmarks/*.md)

lint: $(READY) ## check style, types, layers, the spelling of the documents, the workflow and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell $(DOCUMENTS)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows
	$(BIN)/hadolint Dockerfile

format: $(READY) ## bring the code into the project's format
	$(BIN)/ruff format .

docs: $(READY) ## write the documents and the API reference as a site to build/docs, and check its links
	$(BIN)/python tools/build_docs.py

# The wheel holds the engine that lies in this folder, see pyproject.toml.
wheel: $(RELEASE) ## export same-tiny, and build wheel and sdist with it into dist/; REPOSITORY
	$(BIN)/samekit export same-tiny --out build/engines
	SAMEKIT_REPOSITORY='$(REPOSITORY)' $(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean: ## remove what the other targets made, except the engines in OUT
	rm -rf $(VENV) $(MIN) dist build demo .mypy_cache .ruff_cache .pytest_cache .coverage
