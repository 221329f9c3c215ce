# Two commands do all of it: `make quickstart` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
PY := .venv/bin/python
VLLM ?= 0
TASK ?= code

.PHONY: help install install-dev quickstart test lint unit contract integration e2e gpu lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: ## make .venv with the locked packages (VLLM=1 adds the vLLM server)
	@deploy/venv.sh embedded $(if $(filter 1,$(VLLM)),vllm)

install-dev: ## the same, plus what the tests need
	@deploy/venv.sh embedded dev $(if $(filter 1,$(VLLM)),vllm)

quickstart: install ## from nothing to a chat with your own model (TASK=code)
	@.venv/bin/sage finetune quickstart $(TASK)

test: install-dev ## everything this machine can run; says what it skipped and why
	@deploy/test.sh lint unit contract integration e2e gpu

lint: install-dev ## style, import rules and types
	@deploy/test.sh lint

unit contract integration e2e gpu: install-dev ## one level of the tests
	@deploy/test.sh $@

lock: ## write deploy/requirements/*.txt anew from the pyprojects and pins.txt (needs uv)
	@deploy/requirements/lock.sh

clean: ## remove what the build and the tests left in this folder
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
