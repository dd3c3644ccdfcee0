# `make run` and `make test` need nothing else: each sets up what it needs, once.
SHELL := /bin/bash
PACKAGE := ros_ws/src/hybrid_policy
ACTIVATE := source .venv/bin/activate && export AMENT_PREFIX_PATH="$$VIRTUAL_ENV$${AMENT_PREFIX_PATH:+:$$AMENT_PREFIX_PATH}"
ARGS ?=
TESTS ?= $(PACKAGE)/tests

.PHONY: help run test test-all lint format bench clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ ·/'

run:             ## simulated robot + policy node; latency live, then a table and a picture (ARGS="--help")
	@./setup.sh run
	@$(ACTIVATE) && hybrid-policy up $(ARGS)

test:            ## all tests that run on this machine in minutes
	@./setup.sh dev
	@$(ACTIVATE) && python -m pytest -q -m "not slow" $(TESTS) $(ARGS)

test-all:        ## the slow ones too
	@./setup.sh dev
	@$(ACTIVATE) && python -m pytest -q $(TESTS) $(ARGS)

lint:            ## ruff and mypy
	@./setup.sh dev
	@$(ACTIVATE) && ruff check . && ruff format --check . && mypy

format:          ## ruff's formatter
	@./setup.sh dev
	@$(ACTIVATE) && ruff check --fix . && ruff format .

bench:           ## GPU comparisons (needs a CUDA device; see docs/performance.md)
	@./setup.sh run
	@$(ACTIVATE) && python benchmarks/kernels.py $(ARGS)

clean:           ## remove the environment and outputs
	rm -rf .venv out
