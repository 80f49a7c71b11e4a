# One environment, .venv, for everything. PIP_ARGS reaches pip; for a CPU build of torch on Linux:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO := -e distributions/demo
BENCH := -e distributions/bench
COMFYUI := .venv-comfyui
OLDEST := .venv-oldest

.PHONY: help demo bench test test-oldest test-comfyui quick lint wheels docs clean

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(INSTALLED): pyproject.toml constraints.txt distributions/*/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt $(PIP_ARGS) -e ".[dev]" $(DEMO) $(BENCH)
	touch $@

demo: $(INSTALLED) ## generate 8 prompts with and without TAP, into out/demo
	$(BIN)/tap generate --prompts src/tap_diffusion/apps/ui/prompts.txt --full-steps 8 --compare --repeats 3 --overwrite --out out/demo

bench: $(INSTALLED) ## TAP against a few rivals on the embedded model, minutes; the report goes to out/bench
	$(BIN)/tap bench --suite quick --out out/bench

test: $(INSTALLED) ## the whole test suite
	$(BIN)/pytest

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet -c constraints-oldest.txt $(PIP_ARGS) -e . $(DEMO) hypothesis peft pytest pytest-xdist triton
	touch $@

test-oldest: $(OLDEST)/.installed ## the oldest versions: the quick tests of core and schedulers; FLUX, Wan, Qwen-Image, SD3
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -m "not slow" tests/core $(addprefix tests/integrations/,test_flux.py \
		test_imports.py test_models.py test_schedulers.py test_tracking.py)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest tests/integrations/test_conformance.py \
		-k "FluxTransformer or WanTransformer or QwenImageTransformer or SD3Transformer"
	$(OLDEST)/bin/tap generate "red apple" --steps 12 --full-steps 6 --overwrite --out out/oldest

$(COMFYUI)/.installed: pyproject.toml constraints.txt tests/comfyui/requirements.txt tests/comfyui/get_comfyui.py
	$(PYTHON) -m venv $(COMFYUI)
	$(COMFYUI)/bin/pip install --quiet -c constraints.txt $(PIP_ARGS) -e . $(DEMO) pytest pytest-xdist -r tests/comfyui/requirements.txt
	$(COMFYUI)/bin/python tests/comfyui/get_comfyui.py $(COMFYUI)/comfyui
	touch $@

test-comfyui: $(COMFYUI)/.installed ## the node against the real ComfyUI, in an environment of its own
	OMP_NUM_THREADS=1 $(COMFYUI)/bin/pytest tests/comfyui

quick: $(INSTALLED) ## the tests that take under two minutes together
	$(BIN)/pytest -m "not slow"

lint: $(INSTALLED) ## ruff, mypy, and which part may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

wheels: $(INSTALLED) ## build the three distributions, and try them in a fresh environment
	PIP_ARGS="$(PIP_ARGS)" .ci/wheels

docs: $(INSTALLED) ## the documentation, into out/site; `.venv/bin/mkdocs serve` shows it while it is written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean: ## remove the environment and all output
	rm -rf .venv $(OLDEST) $(COMFYUI) out dist
