# make demo   train a small model, decode it layer-parallel, print the comparison
# make real   the same questions of a real model: download SmolLM2 (98 MB), import it, measure what it gives untrained
# make test   the default test suite          make slow    the tests marked slow
# make lint   ruff, check only                make format  ruff, rewriting
# make types  mypy                            make clean-venv
# make aot    compile for TPUs and GPUs that are not here, in an environment of its own
#
# Each target first builds .venv when it is missing or when pyproject.toml or constraints.txt changed.
# Choose the interpreter with PY=python3.12, the accelerator with JAX=cpu|cuda13|tpu, and pass options with ARGS=...

PY ?= python3
JAX ?= cpu
ARGS ?=
export UV_PYTHON_DOWNLOADS ?= never

EXTRAS_cpu := test
EXTRAS_cuda13 := test,cuda
EXTRAS_tpu := test,tpu
EXTRAS := $(EXTRAS_$(JAX))
ifeq ($(EXTRAS),)
$(error JAX must be cpu, cuda13 or tpu, not '$(JAX)')
endif

PYTHON := .venv/bin/python
# Two processes, each of which keeps to whole files: most of the time is compilation, which one core does.
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile
STAMP := .venv/.installed-$(JAX)

.PHONY: demo real test slow lint format types aot venv clean-venv
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(PYTHON) train.py configs/demo.py --resume
	$(PYTHON) eval.py runs/demo

real: $(STAMP)
	$(PYTHON) benchmarks/real_models.py --quick $(ARGS)

test: $(STAMP)
	$(PYTEST) $(ARGS)

slow: $(STAMP)
	$(PYTEST) -m slow $(ARGS)

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types: $(STAMP)
	$(PYTHON) -m mypy

# The compilers of both accelerators beside this jax: libtpu, and the CUDA plugin without CUDA.
aot: .venv-aot/.installed
	.venv-aot/bin/python -m pytest tests/test_aot.py $(ARGS)

venv: $(STAMP)

clean-venv:
	rm -rf .venv .venv-aot

# A stamp of another JAX means that .venv holds another accelerator's plugin: start over rather than mix them.
# uv is several times faster than pip; where it cannot be had, pip installs the same versions.
$(STAMP): pyproject.toml constraints.txt
	@for stamp in .venv/.installed-*; do \
	    if [ -e "$$stamp" ] && [ "$$stamp" != "$@" ]; then rm -rf .venv; fi; \
	done
	@python="$(PY)"; if [ -x $(PYTHON) ]; then python=$(PYTHON); fi; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "snlp-jax needs Python 3.11 or newer, which '$$python' is not:" \
	        "run 'make clean-venv' and then make with PY=python3.12 or the like." >&2; \
	    exit 1; }
	@if [ ! -x .venv/bin/pip ]; then "$(PY)" -m venv .venv; fi
	@echo "installing into .venv: snlp-jax[$(EXTRAS)]"
	@{ $(PYTHON) -m pip install -q uv && \
	   .venv/bin/uv pip install -q --python $(PYTHON) -e '.[$(EXTRAS)]' -c constraints.txt; } || { \
	    echo "uv did not do it; trying pip" >&2; \
	    $(PYTHON) -m pip install -q -e '.[$(EXTRAS)]' -c constraints.txt; }
	@touch $@

.venv-aot/.installed: $(STAMP)
	$(PYTHON) -m venv --clear .venv-aot
	@echo "installing into .venv-aot: snlp-jax[test,tpu] and the CUDA plugin"
	@.venv-aot/bin/python -m pip install -q -e '.[test,tpu]' -c constraints.txt
	@version=$$(.venv-aot/bin/python -c 'from importlib.metadata import version; print(version("jaxlib"))'); \
	    .venv-aot/bin/python -m pip install -q --no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	@touch $@
