# `make` alone lists the targets. Set-up is in scripts/setup: it is quick when nothing is missing.

PYTHON := .venv/bin/python
# Tests wait much, and a file of tests shares nothing with another: one more at once than CPUs.
WORKERS ?= $(shell expr $$(nproc) + 1)
PYTEST := $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile
SHELL := /bin/sh
.DEFAULT_GOAL := help

.NOTPARALLEL:
.PHONY: help setup demo test check test-kernel test-cluster test-kernels bench fmt clean lint types layers setup-dev root

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## install what is missing to run Pointsman (apt packages, .venv), and say what
	@scripts/setup

demo: root setup ## play the main case in network namespaces (root; FAST=1 for the impatient)
	@$(PYTHON) -m demo $(if $(FAST),--fast)

test: root check test-kernel ## everything but the cluster: lint, types, layers, unit, property, golden and kernel tests (root)

check: setup-dev lint types layers ## lint, types, layers and the tests that need no root
	$(PYTEST) -m "not kernel and not cluster"

test-kernel: root setup-dev ## the tests with real programs in this kernel (root)
	$(PYTEST) -m "kernel and not cluster"

test-cluster: root setup-dev ## the tests with a real Kubernetes control plane, which is built the first time (root, Go)
	$(PYTHON) -m tests.cluster.build
	$(PYTHON) -m pytest -m cluster

test-kernels: root setup-dev ## kernel tests on Debian's 5.10, 6.1, 6.12 and newest kernel in QEMU (KERNELS="5.10 6.1" ARGS="-k …")
	$(PYTHON) -m tests.vm $(KERNELS) $(if $(ARGS),-- $(ARGS))

bench: root setup-dev ## the figures of speed and memory (root)
	$(PYTHON) -m tests.bench

fmt: setup-dev ## format the code and mend what the linter can
	$(PYTHON) -m ruff format
	$(PYTHON) -m ruff check --fix

clean: ## remove .venv and everything that was built or cached
	rm -rf .venv .cache dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lint: setup-dev
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

types: setup-dev
	$(PYTHON) -m mypy -p pointsman -p demo

layers: setup-dev
	.venv/bin/lint-imports

setup-dev:
	@scripts/setup --dev

root:
	@[ "$$(id -u)" -eq 0 ] || { echo "This loads eBPF programs and makes network namespaces: run it as root (sudo make …)."; exit 1; }
