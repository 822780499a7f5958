# vnic: build, try, test. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
RELEASE := $(TARGET_DIR)/release

.PHONY: help setup build guest-image demo test bench benchmark install install-data uninstall lint clean

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

# BENCH=quick: two minutes instead of twenty. BENCH_OPTIONS: more of `vnic-bench --help`, such as --document docs/performance.md.
BENCH ?= full
BENCH_OPTIONS ?=
bench benchmark: setup ## run the benches, then vnicd beside testpmd and OVS-DPDK (needs root; BENCH=quick: two minutes)
	$(CARGO) build --locked --release --package vnic-backend --package vnic-benches
	$(CARGO) bench --locked --package vnic-benches --bench '*' -- $(if $(filter quick,$(BENCH)),--quick)
	VNIC_BIN_DIR=$(RELEASE) nice -n -20 $(RELEASE)/vnic-bench $(if $(filter quick,$(BENCH)),--quick) $(BENCH_OPTIONS)

lint: ## formatting, clippy, docs, and that the committed BPF object matches its source
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --quiet
	scripts/build-bpf.sh --check

# Where systemd, sysctl, sysusers and QEMU's tools look below a prefix (/usr or /usr/local).
UNITS := $(PREFIX)/lib/systemd/system
DESCRIPTIONS := $(PREFIX)/share/qemu/vhost-user
SUBSTITUTE = sed -e 's|@PREFIX@|$(PREFIX)|g'

install: build ## install the programs, systemd units and the description for QEMU's tools, below $(PREFIX)
	install -D -m 0755 $(RELEASE)/vnicd "$(DESTDIR)$(PREFIX)/bin/vnicd"
	install -D -m 0755 $(RELEASE)/vnic "$(DESTDIR)$(PREFIX)/bin/vnic"
	$(MAKE) --no-print-directory install-data

# Everything but the programs, which it does not build.
install-data:
	install -D -m 0644 qemu/vnicd.example.toml "$(DESTDIR)$(PREFIX)/share/doc/vnic/vnicd.example.toml"
	install -D -m 0644 qemu/libvirt/vnic-guest.xml "$(DESTDIR)$(PREFIX)/share/doc/vnic/vnic-guest.xml"
	install -d "$(DESTDIR)$(UNITS)" "$(DESTDIR)$(DESCRIPTIONS)"
	$(SUBSTITUTE) qemu/systemd/vnicd.service >"$(DESTDIR)$(UNITS)/vnicd.service"
	$(SUBSTITUTE) qemu/50-vnicd.json >"$(DESTDIR)$(DESCRIPTIONS)/50-vnicd.json"
	chmod 0644 "$(DESTDIR)$(UNITS)/vnicd.service" "$(DESTDIR)$(DESCRIPTIONS)/50-vnicd.json"
	install -m 0644 qemu/systemd/vnicd.socket qemu/systemd/vnicd@.socket "$(DESTDIR)$(UNITS)"
	install -D -m 0644 qemu/systemd/vnic.sysusers "$(DESTDIR)$(PREFIX)/lib/sysusers.d/vnic.conf"
	install -D -m 0644 qemu/systemd/vnic-hugepages.conf "$(DESTDIR)$(PREFIX)/lib/sysctl.d/60-vnic-hugepages.conf"

uninstall: ## remove what install put there, and folders that this leaves empty
	rm -f "$(DESTDIR)$(PREFIX)/bin/vnicd" "$(DESTDIR)$(PREFIX)/bin/vnic"
	rm -f "$(DESTDIR)$(UNITS)/vnicd.service" "$(DESTDIR)$(UNITS)/vnicd.socket" "$(DESTDIR)$(UNITS)/vnicd@.socket"
	rm -f "$(DESTDIR)$(PREFIX)/lib/sysusers.d/vnic.conf" "$(DESTDIR)$(PREFIX)/lib/sysctl.d/60-vnic-hugepages.conf"
	rm -f "$(DESTDIR)$(DESCRIPTIONS)/50-vnicd.json"
	rm -rf "$(DESTDIR)$(PREFIX)/share/doc/vnic"
	@# Of a real system only folders that it may lack; of a staging folder all that are empty.
	for folder in lib/systemd/system lib/sysusers.d lib/sysctl.d share/qemu/vhost-user; do \
		rmdir --parents --ignore-fail-on-non-empty "$(DESTDIR)$(PREFIX)/$$folder" 2>/dev/null || true; \
	done
	test -z "$(DESTDIR)" || test ! -d "$(DESTDIR)" || find "$(DESTDIR)" -mindepth 1 -depth -type d -empty -delete

clean: ## remove what was built
	$(CARGO) clean
	rm -rf .cache
