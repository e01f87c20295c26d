# Everything runs in .venv, which is made once. `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TOOLS := .venv/.tools

VLLM := $(or $(QUANTKIT_VLLM),.vllm)
NEWER := .transformers-5.24

.PHONY: demo test test-slow engine-test tasks-test check setup docs bench gpu-test gpu-bench gpu-wheels gpu-results clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-slow: $(TOOLS)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# vLLM and transformers on what quantkit writes; installs a vLLM of 3.6 GB unless QUANTKIT_VLLM names one. What concerns
# transformers is run with the version of constraints.txt and with a newer one.
engine-test: $(TOOLS) $(VLLM)/.ready $(NEWER)/.ready
	QUANTKIT_VLLM=$(VLLM) $(BIN)/python -m pytest tests/engines
	$(NEWER)/bin/python -m pytest tests/test_hunyuan_engines.py tests/test_published.py tests/test_transformers.py tests/engines/test_transformers.py
	$(BIN)/python scripts/engine_table.py

$(VLLM)/.ready: scripts/vllm_env.sh
	$(if $(QUANTKIT_VLLM),,PYTHON=$(PYTHON) sh scripts/vllm_env.sh $(VLLM))
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	touch $@

$(NEWER)/.ready: $(TOOLS) scripts/transformers_env.sh
	sh scripts/transformers_env.sh $(NEWER)
	touch $@

check: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

$(TOOLS): $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint .venv/constraints.txt --editable '.[test]'
	touch $(TOOLS)

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) sh scripts/setup.sh
	touch $(READY)

# README, docs/ and the docstrings of what is public as a site in site/. A link that leads nowhere is an error.
docs: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint .venv/constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(TOOLS)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint .venv/constraints.txt --editable '.[bench]'
	$(BIN)/python bench/accuracy.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/eval_speed.py
	$(BIN)/python bench/cpu_kernels.py --threads 1
	$(BIN)/python bench/cpu_kernels.py --threads 2 --out bench/results/cpu_kernels_2_threads.json
	$(BIN)/python bench/cpu_moe.py
	$(BIN)/python bench/generate.py
	$(BIN)/python bench/decode_attention.py
	$(BIN)/python -m bench.plan_scale

# Benchmark tasks through lm-evaluation-harness, which `make test` skips: some 0.7 GB of packages beside torch. Its own `hf`
# model, which quantkit's is held against, needs accelerate.
tasks-test: $(TOOLS)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint .venv/constraints.txt --editable '.[tasks]' accelerate
	$(BIN)/python -m pytest -n 2 tests/test_task_harness.py tests/test_tasks.py tests/test_task_checks.py tests/test_task_data.py tests/test_task_stats.py tests/test_needles.py

# On a machine with an NVIDIA GPU. A .venv made here gets torch with CUDA; `make clean` first if one was made without.
# GPU_PYTHON names an interpreter that has torch with CUDA and what quantkit needs: then nothing is installed.
gpu-test gpu-bench: export QUANTKIT_CUDA = 1
ON_GPU := $(if $(GPU_PYTHON),PYTHONPATH=.:$(PYTHONPATH) $(GPU_PYTHON),$(BIN)/python)

gpu-test: $(if $(GPU_PYTHON),,$(TOOLS))
	$(ON_GPU) -m tests.gpu $(ARGS)

gpu-bench: $(if $(GPU_PYTHON),,$(TOOLS))
	$(ON_GPU) bench/gpu_kernels.py $(ARGS)

# What a machine with torch, Triton, transformers and pytest, but no network, lacks to run scripts/gpu_check.sh: 3 MB in .whl.
WHEELS := annotated-types compressed-tensors loguru pydantic pydantic_core typing_extensions typing-inspection
GPU_PYTHON_VERSION ?= 3.12

gpu-wheels:
	rm -rf .whl
	for name in $(WHEELS); do grep "^$$name==" constraints.txt || exit; done > .whl.txt
	$(PYTHON) -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --implementation cp \
		--python-version $(GPU_PYTHON_VERSION) --platform manylinux2014_x86_64 --dest .whl --requirement .whl.txt
	rm .whl.txt

# FROM: the folder that scripts/gpu_check.sh filled.
gpu-results:
	$(if $(FROM),,$(error FROM=folder is missing: the folder that scripts/gpu_check.sh filled))
	$(BIN)/python bench/gpu_keep.py $(FROM)

clean:
	rm -rf .venv .vllm $(NEWER) .demo build dist site
