# vnic: build, try, test. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
RELEASE := $(TARGET_DIR)/release

.PHONY: help setup build guest-image demo test bench benchmark install uninstall lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: ## install what is missing on a Debian machine (needs root)
	scripts/setup-environment.sh

build: ## build vnicd and vnic (release)
	$(CARGO) build --locked --release --package vnic-backend

guest-image: setup ## build (or find cached) the small guest that the demo and the tests boot
	qemu/build-guest-image.sh

demo: setup ## see it work: a guest's sessions over two NICs, one of which fails (needs root)
	$(CARGO) build --locked --release --package vnic-backend --package vnic-tests
	qemu/build-guest-image.sh
	VNIC_BIN_DIR=$(RELEASE) $(RELEASE)/vnic-demo

test: setup ## run all tests, end-to-end ones with QEMU guests included (needs root)
	$(CARGO) build --locked --release --package vnic-backend
	qemu/build-guest-image.sh
	VNIC_BIN_DIR=$(RELEASE) $(CARGO) test --locked --workspace

bench benchmark: ## run the benches
	$(CARGO) bench --locked --package vnic-benches

lint: ## formatting, clippy, docs, and that the committed BPF object matches its source
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --quiet
	scripts/build-bpf.sh --check

install: build ## install the two programs, below $(PREFIX)
	install -D -m 0755 $(RELEASE)/vnicd $(DESTDIR)$(PREFIX)/bin/vnicd
	install -D -m 0755 $(RELEASE)/vnic $(DESTDIR)$(PREFIX)/bin/vnic
	install -D -m 0644 qemu/vnicd.example.toml $(DESTDIR)$(PREFIX)/share/doc/vnic/vnicd.example.toml

uninstall: ## remove what install put there
	rm -f $(DESTDIR)$(PREFIX)/bin/vnicd $(DESTDIR)$(PREFIX)/bin/vnic
	rm -rf $(DESTDIR)$(PREFIX)/share/doc/vnic

clean: ## remove what was built
	$(CARGO) clean
	rm -rf .cache
