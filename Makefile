# The only set-up: every target makes what it needs, from a bare clone, and does nothing twice.
# Needs Python 3.11 or newer and a package index that pip reaches. An empty TORCH leaves the choice
# of torch to pip.

PYTHON ?= python3
TORCH ?= 2.13.0
WORKERS ?= 2
ARGS ?=
BENCH ?= engine_overhead

VENV := .venv
VENV_MIN := .venv-min
RUN := $(VENV)/bin/python
RUN_MIN := $(VENV_MIN)/bin/python

# The tests: nothing is fetched, and WORKERS processes of one thread each do not fight for the cores.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
PYTEST_ARGS := -n $(WORKERS) --dist loadgroup --doctest-modules hf_adapt tests

# One stamp for each set of packages; the name holds the torch it was made with.
CORE := $(VENV)/.core-$(TORCH)
EXAMPLES := $(VENV)/.examples-$(TORCH)
DEV := $(VENV)/.dev-$(TORCH)
SUITE_DEPS := $(VENV)/.suite-$(TORCH)
BROWSER := $(VENV)/.browser-$(TORCH)
DOCS := $(VENV)/.docs-$(TORCH)
MIN := $(VENV_MIN)/.test-$(TORCH)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# $(call install,VENV,EXTRA,CONSTRAINTS): make VENV where it is missing, and install hf_adapt there.
# `.installing` stays behind only when pip was killed half-way: such a venv is made anew.
define install
@if [ -e $(1)/.installing ] || ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "hf_adapt needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
	rm -rf $(1); \
	$(PYTHON) -m venv $(1); \
fi
@touch $(1)/.installing
@{ grep -v '^torch=' $(3); echo '$(TORCH:%=torch==%)'; } > $(1)/constraints.txt
@echo "Installing hf_adapt$(2) with torch $(TORCH) into $(1) (a minute or two the first time) …"
@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
	-c $(1)/constraints.txt -e '.$(2)' || { rm -f $(1)/.installing; exit 1; }
@rm -f $(1)/.installing
@touch $@
endef

.PHONY: help
help:  ## show this list
	@echo "hf_adapt: make TARGET [TORCH=$(TORCH)] [PYTHON=$(PYTHON)] [WORKERS=$(WORKERS)]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(EXAMPLES)  ## the main job on real data; options in ARGS="--seeds 5"
	$(RUN) examples/domain_shift_text.py --jobs 2 $(ARGS)

.PHONY: demo-unfreezing
demo-unfreezing: $(EXAMPLES)  ## all layers at once, and gradually with one line; ARGS="--layer_decay 0.6"
	$(RUN) examples/gradual_unfreezing.py $(ARGS)

.PHONY: demo-learn-on
demo-learn-on: $(EXAMPLES)  ## a classifier learns a new task and keeps the old one; ARGS="--ratio 0.5"
	$(RUN) examples/learn_on.py $(ARGS)

.PHONY: demo-learn-on-lm
demo-learn-on-lm: $(EXAMPLES)  ## the same for a language model with LoRA; ARGS="--max_steps 100"
	$(RUN) examples/learn_on_lm.py $(ARGS)

.PHONY: demo-images
demo-images: $(EXAMPLES)  ## digits of another kind, without and with one line; ARGS="--method MMD"
	$(RUN) examples/adapt_images.py $(ARGS)

.PHONY: demo-tags
demo-tags: $(EXAMPLES)  ## parts of speech in another genre, without and with one line; ARGS="--method MMD"
	$(RUN) examples/adapt_tags.py $(ARGS)

.PHONY: demo-audio
demo-audio: $(EXAMPLES)  ## digits spoken by someone new, without and with one line; ARGS="--method MMD"
	$(RUN) examples/adapt_audio.py $(ARGS)

.PHONY: demo-retrieval
demo-retrieval: $(EXAMPLES)  ## search among medical terms, without and with one line; ARGS="--method MMD"
	$(RUN) examples/adapt_retrieval.py $(ARGS)

.PHONY: demo-multi-task
demo-multi-task: $(EXAMPLES)  ## one model for three tasks beside a model for each; ARGS="--num_train 1000"
	$(RUN) examples/multi_task.py $(ARGS)

.PHONY: demo-distillation
demo-distillation: $(EXAMPLES)  ## a small classifier learns from a larger one; ARGS="--student_layers 3"
	$(RUN) examples/distil_classifier.py $(ARGS)

.PHONY: demo-distillation-lm
demo-distillation-lm: $(EXAMPLES)  ## half a language model learns from the whole; ARGS="--max_steps 300"
	$(RUN) examples/distil_causal_lm.py $(ARGS)

.PHONY: demo-knowledge
demo-knowledge: $(EXAMPLES)  ## rare words, without and with an ontology; ARGS="--num_labels 400"
	$(RUN) examples/knowledge_injection.py $(ARGS)

.PHONY: notebooks
notebooks: $(DEV)  ## a notebook of each example: examples/notebooks
	$(RUN) scripts/notebooks.py

.PHONY: test
test: lint types docs unit  ## lint, types, the site, doctests and tests: what CI runs

.PHONY: lint
lint: $(DEV)  ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.PHONY: types
types: $(DEV)  ## mypy, strict, on hf_adapt
	$(RUN) -m mypy

.PHONY: unit
unit: $(DEV)  ## doctests and tests; options for pytest in ARGS="-k dann"
	$(TEST_ENV) $(RUN) -m pytest $(PYTEST_ARGS) $(ARGS)

.PHONY: format
format: $(DEV)  ## let ruff fix and format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.PHONY: test-min
test-min: $(MIN)  ## the tests on the oldest supported versions (constraints-min.txt)
	$(TEST_ENV) $(RUN_MIN) -m pytest $(PYTEST_ARGS) $(ARGS)

.PHONY: test-package
test-package:  ## build wheel and sdist, and use them in an empty environment; PYTHON=python3.13
	@scripts/test_package.sh '$(PYTHON)' '$(TORCH)'

.PHONY: test-cuda
test-cuda: $(DEV)  ## the tests marked cuda, one at a time
	$(TEST_ENV) $(RUN) -m pytest -m cuda tests $(ARGS)

.PHONY: test-browser
test-browser: $(BROWSER)  ## the report in a headless Chromium; another in CHROMIUM=/path/to/chrome
	@chromium="$${CHROMIUM:-$$(scripts/find_chromium.sh)}" && echo "Chromium: $$chromium" && \
		CHROMIUM="$$chromium" $(TEST_ENV) $(RUN) -m pytest tests/browser $(ARGS)

.PHONY: docs
docs: $(DOCS)  ## the documentation site: docs/_build/html/index.html
	@rm -rf docs/_build  # half a build keeps old pages and menus, and is quiet about old warnings
	HF_HUB_OFFLINE=1 $(RUN) -m sphinx --quiet --fail-on-warning --keep-going $(ARGS) docs docs/_build/html
	@echo "The site: docs/_build/html/index.html"

.PHONY: bench
bench: $(DEV)  ## BENCH=engine_overhead (the default) or another file of benchmarks/
	$(RUN) benchmarks/$(BENCH).py $(ARGS)

.PHONY: script-table
script-table: $(DEV)  ## official scripts with each capability: docs/scripts.md; ARGS="run_glue dpo"
	$(TEST_ENV) $(RUN) scripts/script_table.py $(ARGS)

.PHONY: trainer-suite
trainer-suite: suite-named $(SUITE_DEPS)  ## transformers' own Trainer tests with our mixin: SUITE=…/tests/trainer
	$(RUN) scripts/trainer_suite.py '$(SUITE)' --workers $(WORKERS) $(ARGS)

.PHONY: suite-named
suite-named:
	@[ -d "$(SUITE)" ] || { echo "Name the tests/trainer folder of a transformers checkout:" \
		"make trainer-suite SUITE=../transformers/tests/trainer" >&2; exit 2; }

.PHONY: clean
clean:  ## remove the environments and caches (not what runs wrote)
	rm -rf $(VENV) $(VENV_MIN) .venv-package build dist docs/_build docs/reference
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(CORE): pyproject.toml constraints.txt
	@rm -f $(VENV)/.core-* $(VENV)/.examples-* $(VENV)/.dev-* $(VENV)/.suite-* $(VENV)/.browser-* $(VENV)/.docs-*
	$(call install,$(VENV),,constraints.txt)

$(EXAMPLES): $(CORE)
	$(call install,$(VENV),[examples],constraints.txt)

$(DEV): $(CORE)
	$(call install,$(VENV),[dev],constraints.txt)

$(DOCS): $(CORE)
	$(call install,$(VENV),[docs],constraints.txt)

$(SUITE_DEPS): $(CORE)
	$(call install,$(VENV),[trainer-suite],constraints.txt)

$(BROWSER): $(CORE)
	$(call install,$(VENV),[browser],constraints.txt)

$(MIN): pyproject.toml constraints.txt constraints-min.txt
	@rm -f $(VENV_MIN)/.test-*
	$(call install,$(VENV_MIN),[test],constraints-min.txt)
