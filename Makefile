# fastcil: each target sets up what it needs; `make` alone lists them.

VENV ?= .venv
PYTHON ?= python3
TORCH := torch==2.13.0
# What torch's CUDA builds of that version bring: the tests count what one compiler makes.
TRITON := triton==3.7.1; sys_platform == 'linux'
JOBS ?= 2
MARKERS ?= not slow and not gpu
PEERS := rational-activations==0.2.0 seaborn pandas nvidia-dali-cuda120 astunparse gast optree \
  makefun kornia kornia_rs torchcam torchvision asdfghjkl==0.1a5 curvlinops-for-pytorch==3.0.1 \
  nngeometry==0.4 kronfluence==1.0.1 backpack-for-pytorch==1.7.1 singd==0.0.5 \
  compressai==1.2.8 einconv einops opt_einsum unfoldNd linear_operator accelerate tqdm
# Room for two raw exemplars of each class, and a twentieth of FOSTER's epochs without its
# AutoAugment, which so short a run has no time to learn through: minutes on two cores.
DEMO_ARGS ?= --methods foster,foster+cim --data scenes:classes=12 --scenario lfs-3 \
  --memory 300KiB --engine.epoch_scale 0.05 --engine.batch_size 32 --network.width 16 \
  --augment.policy none --augment.padding 8 --run_dir demo

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY := extension
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready$(if $(filter 1,$(FASTCIL_NO_EXT)),-no-ext)
endif
# That interpreter's tools, ninja among them, lie beside it or else on the path.
ifneq ($(findstring /,$(PY)),)
export PATH := $(abspath $(dir $(PY))):$(PATH)
endif

.PHONY: help demo test lint bench bench-peers bench-steps bench-sparse gpu test-gpu sanitize \
  bench-gpu bench-gpu-runs clean extension

help:
	@echo "make demo     compare FOSTER with FOSTER+CIM and write the report to demo/"
	@echo "make test     lint, type-check and test; MARKERS=gpu picks other tests"
	@echo "make lint     ruff, mypy and import-linter alone"
	@echo "make bench    time the ops; figures go to benchmarks/results and into README.md"
	@echo "make bench-peers   the same, after the packages they are compared with are installed"
	@echo "make bench-steps   time steps and epochs; PYCIL= and MAMMOTH= name checkouts to time beside"
	@echo "make bench-sparse  count SAMC's exemplars on CIFAR-100 and time what completes them; hours"
	@echo "make gpu      on a GPU: test-gpu, sanitize, bench-gpu, bench-gpu-runs, one after the other"
	@echo "make clean    remove what make made, except the demo's report"
	@echo
	@echo "Each first sets up what it needs, in .venv, from python3 or the PYTHON= you name."
	@echo "VENV=               use that Python and its torch as they are; install nothing"
	@echo "FASTCIL_NO_EXT=1    leave the C++ kernels out"

demo: $(READY)
	$(PY) -m fastcil compare $(DEMO_ARGS)

# A hundred processes start, and all but the first few read what Python keeps of compiled code,
# also where a user's environment would have it kept nowhere.
test: lint
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PY) -m pytest fastcil tests benchmarks -m "$(MARKERS)" --durations=10 \
	  $(call plugin,xdist,-n $(JOBS) --dist worksteal) $(call plugin,pytest_benchmark,--benchmark-disable)

lint: $(READY)
	$(call tool,ruff,check .)
	$(call tool,ruff,format --check .)
	$(call tool,mypy)
	$(call tool,lint-imports,--no-logo)

# BENCH_ARGS='--only pade' times some of them. With VENV= fastcil need not be installed.
RUN = PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PY) benchmarks/run.py
bench: $(READY)
	THP_MEM_ALLOC_ENABLE=1 $(RUN) time $(BENCH_ARGS)
	$(RUN) table

# Without what they ask for: one pins a torch of 2020, the other brings what is not used here.
bench-peers: $(READY)
	$(PIP) --no-deps $(PEERS)
	$(MAKE) bench

# DATA and PHOTOS as fastcil train takes them; PyCIL needs tqdm and scipy, Mammoth tqdm,
# kornia and quadprog. Twenty minutes.
DATA ?= cifar100
PHOTOS ?=
PYCIL ?=
MAMMOTH ?=
STEPS = PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PY) benchmarks/step_run.py
bench-steps: $(READY)
	$(if $(PYCIL)$(MAMMOTH),$(if $(strip $(VENV)),$(PIP) --no-deps tqdm scipy quadprog kornia kornia_rs))
	$(STEPS) time --data $(DATA) $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(PYCIL),--pycil $(PYCIL)) \
	  $(if $(MAMMOTH),--mammoth $(MAMMOTH)) $(STEPS_ARGS)
	$(STEPS) table

# SPARSE_ARGS='--saliency predicted --norms batch' masks as the code of SAMC's Table 4 did.
bench-sparse: $(READY)
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PY) benchmarks/sparse_memory.py --data $(DATA) \
	  $(SPARSE_ARGS)

# Each whatever came of the one before: time on a GPU may be short.
gpu: $(READY)
	$(MAKE) -k test-gpu sanitize bench-gpu bench-gpu-runs

# The files that hold tests for a GPU: the others may need what a bare machine lacks. With
# GPU_MARKERS='gpu and not slow' not every composition is trained, but each method and each addon.
GPU_MARKERS ?= gpu
GPU_TESTS := tests/ops/test_devices.py tests/ops/test_transfer.py \
  tests/engine/test_no_sync.py tests/engine/test_mapped_run.py
test-gpu: $(READY)
	$(PY) -m pytest $(GPU_TESTS) -m "$(GPU_MARKERS)" $(call plugin,xdist,-n $(JOBS)) \
	  $(call plugin,pytest_timeout,--timeout 120)

# Every tensor an allocation of its own: what lies beyond its end is then nobody's. TOOLS= and K=,
# an expression of pytest's, take a part of it.
TOOLS ?= memcheck initcheck racecheck synccheck
K ?=
sanitize: $(READY)
	@failed=; for tool in $(TOOLS); do \
	  echo "compute-sanitizer --tool $$tool"; \
	  [ $$tool = initcheck ] && export FASTCIL_POISON=0 || unset FASTCIL_POISON; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    --report-api-errors no \
	    $(PY) -m pytest tests/ops/test_devices.py -m gpu -q $(if $(K),-k "$(K)") \
	    || failed="$$failed $$tool"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

bench-gpu: $(READY)
	$(RUN) time --device cuda $(BENCH_ARGS)
	$(RUN) table

# One script for each thing that only a GPU can show, each within ten minutes.
bench-gpu-runs: $(READY)
	failed=; for script in $(filter-out benchmarks/gpu/kept.py,$(wildcard benchmarks/gpu/*.py)); do \
	  PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PY) $$script --data $(DATA) $(RUNS_ARGS) \
	  || failed=1; done; [ -z "$$failed" ]

clean:
	rm -rf .venv build dist fastcil.egg-info fastcil/_C*.so
	rm -rf .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# With VENV= a tool or pytest plugin that is missing is named and passed over.
tool = @if [ -n "$(strip $(VENV))" ] || command -v $(1) >/dev/null; then \
	  set -x; $(1) $(2); else echo "$(1) is missing here: not run"; fi
plugin = $$(if [ -n "$(strip $(VENV))" ] || $(PY) -c "import $(1)" 2>/dev/null; then \
	  echo "$(2)"; else echo "$(1) is missing here: not used" >&2; fi)

PIP := $(PY) -m pip install -qq --no-input --disable-pip-version-check

# In place, and linked anew: the interpreter or its torch may have changed.
BUILD := rm -f fastcil/_C*.so; \
	  if [ "$$FASTCIL_NO_EXT" != 1 ]; then $(PY) setup.py -q build_ext --inplace --force; fi

# What was built of these sources for this interpreter and this torch is taken as it is.
STAMP := build/extension
extension:
	@made="$$($(PY) -c 'import sys, torch; print(sys.version, torch.__version__)')" || exit 1; \
	  if [ "$$FASTCIL_NO_EXT" != 1 ] && ls fastcil/_C*.so >/dev/null 2>&1 && \
	    [ "$$made" = "$$(cat $(STAMP) 2>/dev/null)" ] && \
	    [ -z "$$(find setup.py csrc -newer $(STAMP))" ]; then exit 0; fi; \
	  rm -f $(STAMP); { $(BUILD); } || exit 1; \
	  if [ "$$FASTCIL_NO_EXT" != 1 ]; then mkdir -p build; echo "$$made" > $(STAMP); fi

# One recipe, so that its time is one figure. torch goes first and alone: the packages that follow
# take the one they find.
SETTINGS := Makefile pyproject.toml fastcil/_version.py
$(VENV)/.ready $(VENV)/.ready-no-ext: $(SETTINGS) setup.py $(wildcard csrc/*)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
	  echo "fastcil: $(PYTHON) is not Python 3.10 or later: name one that is, PYTHON=..." >&2; exit 1; }
	@[ "$$FASTCIL_NO_EXT" = 1 ] || { set -- $$CXX; \
	  for name in $${1:-g++ c++ clang++}; do command -v $$name >/dev/null && exit; done; \
	  echo "fastcil: no C++ compiler was found (looked for $${1:-g++, c++ and clang++}):" \
	    "install one, or set FASTCIL_NO_EXT=1 to do without the C++ kernels." >&2; exit 1; }
	@set -e; start=$$(date +%s); rm -f $(VENV)/.ready*; \
	  if [ -n "$$(find $(SETTINGS) -newer $(VENV)/.packages 2>&1)" ]; then \
	    echo "set-up: $(TORCH), fastcil and its tools into $(VENV); a few minutes the first time"; \
	    $(PYTHON) -m venv $(VENV); \
	    $(PIP) $(TORCH) "$(TRITON)"; \
	    $(PIP) "setuptools>=77" ninja; \
	    FASTCIL_NO_EXT=1 $(PIP) --no-build-isolation -e ".[test]"; \
	    touch $(VENV)/.packages; \
	  fi; \
	  $(BUILD); \
	  touch $@; echo "set-up: $$(($$(date +%s) - start)) s"
