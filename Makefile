# make demo: environment, install, data, the default recipe's stages. make test: environment, install, the tests.
# Settings: PYTHON (interpreter, at least 3.11), VENV (where the environment lives), ARGS (passed on).
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
RUN = $(VENV)/bin/python
TRITON = triton==3.6.0
KERNEL_TESTS = PYTHONPATH=$(abspath $(VENV))/kernels TRITON_INTERPRET=1 $(RUN) -m pytest -q -n 2 --dist load \
	tests/test_ssd_triton.py tests/test_conv_triton.py tests/test_gated_norm_triton.py tests/test_mamba2_core.py tests/test_cast_triton.py \
	tests/test_gla_triton.py tests/test_loss_triton.py tests/test_zero_one.py

.DEFAULT_GOAL := help
.PHONY: help env demo test test-kernels test-floor lint torture schema clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

env: $(VENV)/.installed  ## the environment alone

$(VENV)/.installed: pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh

demo: env  ## the default recipe's stages on real text; a second run finds them done
	@$(RUN) pipelines/run.py --all $(ARGS)

test: env lint $(VENV)/kernels/.installed  ## ruff, mypy and the tests (CPU, no network)
	@$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)
	@$(KERNEL_TESTS)

test-kernels: env $(VENV)/kernels/.installed  ## our Triton kernels alone, on the CPU by Triton's interpreter
	@$(KERNEL_TESTS)

# Triton in a place of its own: no other test, and no user of the environment, meets it.
$(VENV)/kernels/.installed: Makefile | env
	@rm -rf $(VENV)/kernels
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/kernels $(TRITON)
	@touch $@

lint: env  ## ruff and mypy alone
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

test-floor:  ## the tests on the oldest supported transformers, in an environment of its own
	@$(MAKE) --no-print-directory env VENV=.venv-floor CONSTRAINTS=constraints-floor.txt
	@.venv-floor/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

torture: env  ## 60 SIGKILLs, flipped bytes, a full disk; each must end bit-equal
	@$(RUN) scripts/torture.py $(ARGS)

schema: env  ## write pipelines/recipes/schema.json anew
	@$(RUN) -m pipelines.recipe --write-schema

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .venv-floor .cache .pytest_cache .mypy_cache .ruff_cache
