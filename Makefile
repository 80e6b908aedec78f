# `make demo` shows the main job on real input, `make test` is everything that CI runs. Each does all of its own set-up.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# What takes long to make and does not depend on target/ is kept here, by content. `make CACHE=DIR ...` takes another one, which
# may be somebody else's: what is there is only read.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tiffin
TOOLS := $(CACHE)/tools
GUEST := target/guest
comma := ,
TARGET := $(shell uname -m)-unknown-linux-gnu
AGENT := target/$(TARGET)/agent/envd
PREFIX ?= /usr/local

VHOST_DEVICE_VSOCK_VERSION := 0.3.0
NEXTEST_VERSION := 0.9.143

# Debian packages, by what needs them: the builds, the guest kernel, running, and only the tests.
PACKAGES := gcc libc6-dev libseccomp-dev pkg-config ca-certificates curl \
	linux-source-6.1 make flex bison bc libelf-dev libssl-dev xz-utils \
	qemu-system-x86 mmdebstrap nftables iproute2 passt \
	buildah docker-registry containerd \
	e2fsprogs skopeo umoci attr busybox-static cpio procps python3-venv qemu-utils strace systemd uidmap
# Only for fuzzing and for benches.
FUZZ_PACKAGES := g++
BENCH_PACKAGES := openssh-server openssh-client

export TIFFIN_VHOST_DEVICE_VSOCK := $(TOOLS)/bin/vhost-device-vsock
export TIFFIN_PYTHON := $(TOOLS)/python/bin/python
# The published JavaScript clients (the folder is by their lock file), and a Node.js that they run on: Debian 12's is too old.
export TIFFIN_JAVASCRIPT := $(TOOLS)/javascript
export TIFFIN_NODE := $(TOOLS)/javascript/node_modules/node-linux-$(subst aarch64,arm64,$(subst x86_64,x64,$(shell uname -m)))/bin/node

# Earlier ones, kept apart: they have the same names. What they run on is above.
export TIFFIN_JAVASCRIPT_OLDER := $(TOOLS)/javascript-older
export TIFFIN_PYTHON_OLDER := $(TOOLS)/python-older/bin/python

# RELR packs the relocations of a static-pie: 312 KiB less.
STATIC := RUSTFLAGS="-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs" LIBSECCOMP_LINK_TYPE=static \
	LIBSECCOMP_LIB_PATH=/usr/lib/$(shell uname -m)-linux-gnu

say = @printf '\033[1m== %s\033[0m\n' "$(1)"

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: packages
packages:
	@missing=$$(for p in $(PACKAGES) $(MORE_PACKAGES); do \
		[ "$$(dpkg-query -W -f '$${db:Status-Status}' $$p 2>/dev/null)" = installed ] || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		[ "$$(id -u)" = 0 ] || { \
			echo "packages are missing, which only root can install: apt-get install" $$missing >&2; exit 1; }; \
		echo "installing Debian packages:" $$missing; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	fi

.PHONY: kernel
kernel: packages ## the guest kernel (built once, then from the cache)
	$(call say,guest kernel)
	guest-kernel/build.sh --cache $(CACHE)/kernel --out $(GUEST)

.PHONY: agent
agent: packages ## the static envd
	$(call say,envd (static))
	$(STATIC) cargo build --locked --target $(TARGET) --profile agent -p envd

.PHONY: release
release: packages
	$(call say,workspace (release))
	cargo build --locked --release -p image-builder -p rootfs-tools -p host-shim -p tiffin-gateway --bins

.PHONY: install
install: kernel agent release ## binaries, kernel and guest image under PREFIX (default /usr/local)
	$(call say,install to $(PREFIX))
	install -d $(PREFIX)/bin $(PREFIX)/share/tiffin
	install -m 755 $(AGENT) target/release/{image-builder,rootfs-tools,host-shim,tiffin-gateway} $(PREFIX)/bin
	install -m 644 $(GUEST)/vmlinux LICENSE NOTICE $(PREFIX)/share/tiffin
	$(PREFIX)/bin/rootfs-tools guest-image --envd $(PREFIX)/bin/envd -o $(PREFIX)/share/tiffin/guest-image.cpio

.PHONY: dist
dist: ## one tarball of what install puts down
	$(MAKE) install PREFIX=$(CURDIR)/target/dist/tiffin
	tar -C target/dist --sort=name --owner=0 --group=0 --numeric-owner -czf target/tiffin-$$(uname -m).tar.gz tiffin
	@ls -l target/tiffin-$$(uname -m).tar.gz

.PHONY: demo
demo: ## from a Dockerfile to cowsay in a microVM, twice
	@tests/demo.sh

.PHONY: demo-run
demo-run: ## the demo with what is installed in PREFIX; nothing is built
	@tests/demo.sh $(PREFIX)

.PHONY: demo-sdk
demo-sdk: ## a gateway, and the published E2B clients run against it
	@tests/demo-sdk.sh

.PHONY: nextest
nextest:
	@command -v cargo-nextest >/dev/null || [ -x $(TOOLS)/bin/cargo-nextest ] || \
		cargo install --locked cargo-nextest --version $(NEXTEST_VERSION) --root $(TOOLS)

.PHONY: vhost-device-vsock
vhost-device-vsock: packages
	@[ -x $(TIFFIN_VHOST_DEVICE_VSOCK) ] || \
		cargo install --locked vhost-device-vsock --version $(VHOST_DEVICE_VSOCK_VERSION) --root $(TOOLS)

.PHONY: python
python: packages
	@cmp -s tests/python/requirements.txt $(TOOLS)/python/requirements.txt || { \
		python3 -m venv --clear $(TOOLS)/python && \
		$(TOOLS)/python/bin/pip install -q --disable-pip-version-check -r tests/python/requirements.txt && \
		cp tests/python/requirements.txt $(TOOLS)/python/; }

.PHONY: javascript
javascript: packages
	@cmp -s tests/javascript/package-lock.json $(TOOLS)/javascript/package-lock.json || { \
		command -v npm >/dev/null || { apt-get update -q && \
			DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends npm; }; \
		mkdir -p $(TOOLS) && new=$$(mktemp -d $(TOOLS)/javascript.XXXXXX) && \
		cp tests/javascript/package*.json $$new && \
		(cd $$new && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error) && \
		rm -rf $(TOOLS)/javascript && mv $$new $(TOOLS)/javascript; }

.PHONY: older-clients
older-clients: packages javascript
	@cmp -s tests/javascript/older/package-lock.json $(TOOLS)/javascript-older/package-lock.json || { \
		new=$$(mktemp -d $(TOOLS)/javascript-older.XXXXXX) && \
		cp tests/javascript/older/package*.json $$new && \
		(cd $$new && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error) && \
		rm -rf $(TOOLS)/javascript-older && mv $$new $(TOOLS)/javascript-older; }
	@cmp -s tests/python/older/requirements.txt $(TOOLS)/python-older/requirements.txt || { \
		python3 -m venv --clear $(TOOLS)/python-older && \
		$(TOOLS)/python-older/bin/pip install -q --disable-pip-version-check -r tests/python/older/requirements.txt && \
		cp tests/python/older/requirements.txt $(TOOLS)/python-older/; }

.PHONY: test-binaries
test-binaries: packages
	$(call say,workspace)
	cargo build --locked --workspace --bins

# Images of the tests that are not busybox: one with an init of its own, one with what the template `base` of the gateway
# installs, and one with what must be different in each clone. Named by what they are made of: another list makes another file.
IMAGE_ROOT = $(CACHE)/debian-bookworm-$(shell uname -m)-$(subst $(comma),-,$(1)).tar
SYSTEMD_INCLUDE := systemd,systemd-sysv,dbus
SYSTEMD_ROOT := $(call IMAGE_ROOT,$(SYSTEMD_INCLUDE))
BASE_INCLUDE := bash,ca-certificates,cowsay,curl,git,procps,python3,python3-venv,sudo
BASE_ROOT := $(call IMAGE_ROOT,$(BASE_INCLUDE))
CLONES_INCLUDE := openssh-server,openssl,python3,uuid-runtime
CLONES_ROOT := $(call IMAGE_ROOT,$(CLONES_INCLUDE))

$(SYSTEMD_ROOT): INCLUDE := $(SYSTEMD_INCLUDE)
$(BASE_ROOT): INCLUDE := $(BASE_INCLUDE)
$(CLONES_ROOT): INCLUDE := $(CLONES_INCLUDE)
$(SYSTEMD_ROOT) $(BASE_ROOT) $(CLONES_ROOT): | packages
	$(call say,Debian with $(INCLUDE))
	mkdir -p $(CACHE)
	mmdebstrap --variant=minbase --include=$(INCLUDE) --aptopt='Apt::Install-Recommends "false"' \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' bookworm $@.$$$$.tmp.tar && mv $@.$$$$.tmp.tar $@

.PHONY: test-guest
test-guest: kernel agent test-binaries $(SYSTEMD_ROOT) $(BASE_ROOT) $(CLONES_ROOT)
	target/debug/rootfs-tools guest-image --envd $(AGENT) -o $(GUEST)/guest-image.cpio
	tests/prepare.sh target/debug target/e2e $(SYSTEMD_ROOT) $(BASE_ROOT) $(CLONES_ROOT)

E2E_ENV := PATH="$$PATH:$(TOOLS)/bin" TIFFIN_BIN=$(CURDIR)/target/debug TIFFIN_AGENT=$(CURDIR)/$(AGENT) \
	TIFFIN_KERNEL=$(CURDIR)/$(GUEST)/vmlinux TIFFIN_GUEST_IMAGE=$(CURDIR)/$(GUEST)/guest-image.cpio \
	TIFFIN_E2E_DATA=$(CURDIR)/target/e2e

.PHONY: e2e
e2e: packages nextest test-guest vhost-device-vsock python javascript older-clients ## the end-to-end tests alone
	$(E2E_ENV) cargo nextest run --locked -p e2e

# The fuzz targets are a workspace of their own. They are not linked here, so libFuzzer is not built, which takes g++.
FUZZ_LINT := CUSTOM_LIBFUZZER_PATH=/unlinked/libfuzzer.a cargo clippy --locked --workspace \
	--manifest-path tests/fuzz/Cargo.toml --target-dir target/fuzz/lint

.PHONY: lint
lint: packages ## fmt, clippy and docs, warnings denied
	$(call say,fmt)
	cargo fmt --all --check
	cargo fmt --all --manifest-path tests/fuzz/Cargo.toml --check
	$(call say,clippy)
	cargo clippy --locked --workspace --all-targets -- -D warnings
	$(FUZZ_LINT) -- -D warnings
	$(call say,doc)
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items

.PHONY: test
test: packages nextest ## everything that CI runs
	$(MAKE) lint
	$(MAKE) test-guest vhost-device-vsock python javascript older-clients
	$(call say,guest kernel)
	guest-kernel/test.sh $(GUEST)/config
	$(call say,tests)
	$(E2E_ENV) cargo nextest run --locked --workspace

.PHONY: test-long
test-long: packages nextest python javascript ## a hundred clones; ten million entries; the example image code-interpreter, with its published clients
	$(MAKE) test-guest
	$(E2E_ENV) cargo nextest run --locked --workspace --run-ignored only -E 'package(e2e)'
	cargo nextest run --locked --release -p rootfs-tools --lib ten_million
	$(MAKE) install PREFIX=$(CURDIR)/target/test-long
	tests/interpreter.sh $(CURDIR)/target/test-long

.PHONY: test-crash
test-crash: packages nextest test-guest python ## host-shim killed at every step of every verb, not only at some
	TIFFIN_CRASH_EVERY=1 $(E2E_ENV) cargo nextest run --locked --workspace -E 'package(e2e) and test(crash::)'

.PHONY: test-kvm
test-kvm: packages nextest test-guest vhost-device-vsock ## the end-to-end tests with KVM on each VMM of this host; prints a row for the README
	$(E2E_ENV) tests/kvm.py

.PHONY: bench-boot
bench-boot: test-guest ## CPU time of a boot, against an init that only dials out
	$(STATIC) cargo build --locked --target $(TARGET) --profile agent -p envd --example dial_out
	$(E2E_ENV) TIFFIN_DIAL_OUT=$(CURDIR)/target/$(TARGET)/agent/examples/dial_out \
		cargo bench --locked -p e2e --bench boot

.PHONY: bench-snapshots
bench-snapshots: test-guest release ## restores, forks, snapshots and clones, against a bare guest and plain copies
	$(STATIC) cargo build --locked --target $(TARGET) --profile agent -p envd --example bare_exec
	$(E2E_ENV) TIFFIN_BIN=$(CURDIR)/target/release TIFFIN_BARE_EXEC=$(CURDIR)/target/$(TARGET)/agent/examples/bare_exec \
		cargo bench --locked -p e2e --bench snapshots

$(CACHE)/debian-base.tar: | packages
	mkdir -p $(CACHE)
	mmdebstrap --variant=minbase bookworm $@.$$$$.tmp.tar && mv $@.$$$$.tmp.tar $@

.PHONY: bench-rootfs
bench-rootfs: packages $(CACHE)/debian-base.tar ## a Debian base to ext4, against tar and mke2fs
	cargo bench --locked -p rootfs-tools --bench rootfs -- $(CACHE)/debian-base.tar 10

# Debian's buildah is what the times are compared with.
.PHONY: bench-build
bench-build: MORE_PACKAGES := buildah
bench-build: packages $(CACHE)/debian-base.tar ## builds on a Debian base, against buildah; a context of 1 GiB
	cargo bench --locked -p image-builder --bench build -- $(CACHE)/debian-base.tar 5

.PHONY: bench-chunks
bench-chunks: packages test-guest ## what the root file systems of the tests' templates share as chunks
	cargo bench --locked -p rootfs-tools --bench chunks -- \
		$(CURDIR)/target/e2e/templates/{systemd,clones,base}/rootfs.ext4

.PHONY: fuzz
fuzz: MORE_PACKAGES := $(FUZZ_PACKAGES)
fuzz: packages ## each fuzz target for FUZZ_SECONDS (default 60)
	$(call say,fuzz)
	tests/fuzz/run.sh

.PHONY: bench-envd
bench-envd: MORE_PACKAGES := $(BENCH_PACKAGES)
bench-envd: test-guest vhost-device-vsock ## the agent's times, rates and memory, against ssh, sftp and the raw channel
	$(E2E_ENV) cargo bench --locked -p e2e --bench envd

.PHONY: bench-gateway
bench-gateway: packages ## what the gateway costs a call and a stream, and its memory
	cargo build --locked --release -p envd -p tiffin-gateway --bins
	cargo bench --locked -p tiffin-gateway --bench proxy

.PHONY: bench-creates
bench-creates: test-guest release python ## creates through the gateway, restored and from a pool, against host-shim start
	mkdir -p target/tmp
	$(E2E_ENV) TIFFIN_BIN=$(CURDIR)/target/release TIFFIN_BENCH_DIR=$(CURDIR)/target/tmp \
		$(TOOLS)/python/bin/python tests/benches/creates.py

.PHONY: soak
soak: agent ## SOAK_CYCLES (default 10000) times start, reattach and kill
	TIFFIN_AGENT=$(CURDIR)/$(AGENT) cargo bench --locked -p e2e --bench soak

.PHONY: bench-agent
bench-agent: agent ## size of envd on disk and in memory
	tests/benches/agent.sh $(AGENT)

.PHONY: clean
clean: ## remove target/ (not the cache)
	cargo clean
