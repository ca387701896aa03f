# `make` alone lists the targets. Set-up is in scripts/setup: it is quick when nothing is missing.

PYTHON := .venv/bin/python
# Tests wait much, and a file of tests shares nothing with another: one more at once than CPUs.
WORKERS ?= $(shell expr $$(nproc) + 1)
PYTEST := $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SHELL := /bin/sh
PREFIX ?= /opt/pointsman
.DEFAULT_GOAL := help

.NOTPARALLEL:
.PHONY: help setup demo test check test-kernel test-cluster test-kernels test-package test-vagrant bench fmt clean \
	install uninstall deb man lint types layers setup-dev setup-vm root

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## install what is missing to run Pointsman (apt packages, .venv), and say what
	@scripts/setup

demo: root setup ## play the main case in network namespaces (root; FAST=1 for the impatient)
	@$(PYTHON) -m demo $(if $(FAST),--fast)

test: root check test-kernel ## everything but the cluster: lint, types, layers, unit, property, golden and kernel tests (root)

check: setup-dev lint types layers ## lint, types, layers and the tests that need no root
	$(PYTEST) -m "not kernel and not cluster and not package"

test-kernel: root setup-dev ## the tests with real programs in this kernel (root)
	$(PYTEST) -m "kernel and not cluster"

test-cluster: root setup-dev ## the tests with a real Kubernetes control plane, which is built the first time (root, Go)
	$(PYTHON) -m tests.cluster.build
	$(PYTHON) -m pytest -m cluster

test-package: root setup-vm ## install below a directory; install, upgrade and purge in a machine with systemd (root, QEMU, debhelper)
	$(PYTHON) -m pytest -m package
	$(PYTHON) -m tests.package

test-vagrant: root setup-dev ## a VM with Pointsman on it, by Vagrant and libvirt, with the kernel tests inside (root; ARGS for a part of them)
	@ARGS='$(subst ','\'',$(ARGS))' vagrant/test

test-kernels: root setup-vm ## kernel tests on Debian's 5.10, 6.1, 6.12 and newest kernel in QEMU (KERNELS="5.10 6.1" ARGS="-k …" MINUTES=60)
	$(PYTHON) -m tests.vm $(KERNELS) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ARGS),-- $(ARGS))

bench: root setup-dev ## the figures of speed and memory (root)
	$(PYTHON) -m tests.bench

install: $(if $(DESTDIR),,root) ## put Pointsman on this node: /opt/pointsman, a systemd unit, the man page (root; PREFIX=, DESTDIR=)
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" scripts/install

uninstall: $(if $(DESTDIR),,root) ## take that away, and out of the kernel (root; the same PREFIX=)
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" scripts/install --uninstall

deb: ## build dist/pointsman_….deb (needs debhelper)
	@scripts/deb $(SUFFIX)

man: setup ## show the man page
	@mkdir -p dist
	@$(PYTHON) -m pointsman.cli.manual man >dist/pointsman.8
	@man -l dist/pointsman.8

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

setup-vm:
	@scripts/setup --vm

root:
	@[ "$$(id -u)" -eq 0 ] || { echo "This loads eBPF programs and makes network namespaces: run it as root (sudo make …)."; exit 1; }
