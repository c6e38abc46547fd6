# The few commands. Each says itself what it does; `make` lists them.

.PHONY: help install fast test check guide torches package coverage mutation

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

install:  ## everything that a contributor needs, into this environment
	pip install -e '.[dev,docs]'
	pre-commit install

fast:     ## the tests that take seconds, in about two minutes
	pytest -m "not slow"

test:     ## all tests, a tenth of CI's examples
	pytest

check:    ## linter, formatter, type checker
	ruff check .
	ruff format --check .
	mypy

guide:    ## the guide and the reference, into site/
	python docs/build.py

torches:  ## what stands on private torch, on every torch that is supported
	python .ci/torches.py

package:  ## sdist and wheel as an index would get them, built and used
	pip install -q build twine
	python .ci/package.py

coverage: ## which lines the fast tests run
	pytest -m "not slow" -q --cov

mutation: ## plant 200 faults, one at a time, and see the tests fail
	python -m property_tests.mutation --sample 200
