# kuasar-embed. `make run` and `make test` are all a newcomer needs; `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

CARGO   ?= cargo
# cargo's name for the profile of the daemon and the CLI in `make run` and benchmarks.
PROFILE ?= release
PREFIX  ?= /usr/local
# How long `make fuzz` runs each target.
SECONDS ?= 20
ARCH    := x86_64-unknown-linux-gnu

BIN     := target/$(PROFILE)
AGENT   := target/guest/$(ARCH)/guest/vmm-task
DEMO    := target/demo/rootfs
STEP    := @scripts/step
TEST    := CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$(CURDIR)/scripts/test-runner $(CARGO) test --workspace
# What pods do, whatever their VM is.
EXTERNAL_TESTS := container pods network images disks elastic

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: run
run: setup build guest $(DEMO) ## Set up, build, and run a container in a microVM
	$(STEP) "run a container in a microVM" -- $(BIN)/kuasar-ctl run --rootfs $(DEMO) \
		-- /bin/sh -c 'echo "Hello from Linux $$(uname -r), pid $$$$ of $$(hostname), $$(nproc) CPU"'

.PHONY: test
test: setup agent containerd ## Set up, build, and run all tests
	$(STEP) "install QEMU" -- scripts/setup qemu-system-x86
	$(STEP) "build everything" -- $(CARGO) build --workspace --all-targets
	$(MAKE) --no-print-directory guest PROFILE=debug
	$(STEP) "unit and integration tests" -- env TESTS=unit $(TEST)
	$(STEP) "end-to-end tests" -- env TESTS=e2e $(TEST) --tests
	$(STEP) "end-to-end tests in QEMU" -- env BACKEND=qemu TESTS='$(EXTERNAL_TESTS)' $(TEST) --tests
	$(STEP) "end-to-end tests in QEMU, Debian's kernel" -- scripts/with-distro-guest target/debug/kuasar-ctl $(AGENT) \
		env BACKEND=qemu TESTS=container $(TEST) --tests
	$(STEP) "conformance, all rows in QEMU" -- target/debug/kuasar-e2e run all --backend qemu
	$(STEP) "conformance, core rows in QEMU behind shims" -- target/debug/kuasar-e2e run core --backend qemu --mode shim
	$(STEP) "conformance, some rows in-process" -- target/debug/kuasar-e2e run 1,7,12,51
	$(STEP) "soak, a little" -- target/debug/kuasar-e2e soak --sequential 2 --parallel 3

.PHONY: setup
setup: ## Install what is missing (apt, when root)
	$(STEP) "check build tools" -- scripts/setup

.PHONY: build
build: ## Build the daemon, the CLI and the agent
	$(STEP) "build the daemon and the CLI" -- $(CARGO) build --profile $(PROFILE) -p sandboxer -p external-hv
	@$(MAKE) --no-print-directory agent

# One process per pod: built for size, whatever the profile of the rest.
.PHONY: shim
shim: ## Build containerd's shim programs
	$(STEP) "build the shims" -- $(CARGO) build --profile shim -p shim

# The agent is PID 1 of an empty file system: linked statically, for any x86-64 CPU.
.PHONY: agent
agent: ## Build the static guest agent
	$(STEP) "build the guest agent" -- env \
		CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static' \
		$(CARGO) build --profile guest -p vmm-task --target $(ARCH) --target-dir target/guest

.PHONY: guest
guest: ## Build the guest kernel and initramfs (cached by the hash of their inputs)
	$(STEP) "build the guest image" -- $(BIN)/kuasar-ctl guest build --agent $(AGENT)

$(DEMO): scripts/demo-rootfs
	$(STEP) "make a demo root file system" -- scripts/demo-rootfs $@

# Tests that need it say `skipped:` without it, so that a host without Debian's archive can test.
.PHONY: containerd
containerd: ## Get containerd and the CNI plugins for the tests (unpacked in the cache, not installed)
	-$(STEP) "get containerd for the tests" -- scripts/containerd

.PHONY: lint
lint: ## Format, clippy, dependency rules
	$(STEP) "rustfmt" -- $(CARGO) fmt --all --check
	$(STEP) "clippy" -- $(CARGO) clippy --workspace --all-targets -- -D warnings
	$(STEP) "one version of each rust-vmm crate" -- scripts/check-versions
	$(STEP) "cargo deny" -- scripts/deny

.PHONY: fuzz
fuzz: ## Every fuzz target from its corpus, SECONDS (20) each; see tests/fuzz/README.md
	$(STEP) "build the fuzz targets" -- scripts/fuzz-smoke -b
	$(STEP) "fuzz" -- scripts/fuzz-smoke -s $(SECONDS)

.PHONY: bench-boot
bench-boot: setup build guest ## Boot phases beside QEMU and other VMMs; writes target/bench/boot.json
	$(STEP) "install QEMU, to compare with" -- scripts/setup qemu-system-x86
	$(STEP) "build the VMM's example" -- $(CARGO) build --release -p vmm-core --example boot
	$(STEP) "boot benchmark" -- $(CARGO) run --release -p bench --bin bench-boot

.PHONY: bench-hv
bench-hv: build guest ## The same work on each backend that is here, Cloud Hypervisor at BIN; writes target/bench/hv.json
	$(STEP) "install QEMU" -- scripts/setup qemu-system-x86
	$(STEP) "hypervisor benchmark" -- $(CARGO) run --release -p bench --bin bench-hv -- \
		$(if $(BIN),--cloud-hypervisor '$(BIN)')

.PHONY: bench-io
bench-io: build guest ## Disk, share, network and vsock in pods of each backend; writes target/bench/io.json
	$(STEP) "install QEMU, to compare with" -- scripts/setup qemu-system-x86
	$(STEP) "I/O benchmark" -- $(CARGO) run --release -p bench --bin bench-io

.PHONY: test-external
test-external: agent ## The end-to-end tests in VMs of HV=qemu|cloud-hypervisor|stratovirt, its program BIN=/path
	$(STEP) "build everything" -- $(CARGO) build --workspace --all-targets
	$(MAKE) --no-print-directory guest PROFILE=debug
	$(STEP) "end-to-end tests" -- env BACKEND=$(or $(HV),qemu) $(if $(BIN),KUASAR_HYPERVISOR_PATH='$(BIN)') \
		TESTS='$(EXTERNAL_TESTS) external stratovirt' $(TEST) --tests

.PHONY: install
install: setup build shim guest ## Install below DESTDIR (empty) and PREFIX (/usr/local): programs, guest, unit, manual
	$(STEP) "install" -- env DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' scripts/install $(BIN) target/shim

.PHONY: uninstall
uninstall: ## Remove what `make install` installed, with the same DESTDIR and PREFIX
	$(STEP) "uninstall" -- env DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' scripts/uninstall

.PHONY: deb
deb: setup build shim guest ## A Debian package in target/package
	$(STEP) "pack" -- scripts/package deb $(BIN) target/shim target/package

.PHONY: rpm
rpm: setup build shim guest ## An RPM package in target/package
	$(STEP) "install rpmbuild" -- scripts/setup rpm
	$(STEP) "pack" -- scripts/package rpm $(BIN) target/shim target/package

# What `make conformance` and `make soak` run on; see `kuasar-e2e --help`.
BACKEND ?= in-process
MODE    ?= proxy
SNAPSHOTTER ?= overlayfs
ROWS    ?= all

.PHONY: conformance
conformance: setup agent containerd e2e ## All rows of docs/conformance.md; BACKEND=in-process|qemu MODE=proxy|shim|shim-1.7 ROWS=all|core|1,7-9 SNAPSHOTTER=overlayfs|native|blockfile|erofs
	$(STEP) "conformance" -- target/debug/kuasar-e2e run $(ROWS) --mode $(MODE) --backend $(BACKEND) --snapshotter $(SNAPSHOTTER) \
		--markdown target/conformance-$(BACKEND)-$(MODE).md

.PHONY: soak
soak: setup agent containerd e2e ## 100 pods one after the other and 30 at once: nothing may be left
	$(STEP) "soak" -- target/debug/kuasar-e2e soak --mode $(MODE) --backend $(BACKEND)

.PHONY: e2e
e2e:
	$(STEP) "build the daemons and kuasar-e2e" -- $(CARGO) build --workspace --bins
	@$(MAKE) --no-print-directory guest PROFILE=debug

.PHONY: bench-containerd
bench-containerd: build guest containerd ## Pods through containerd's CRI beside runc's; writes target/bench/containerd.json
	$(STEP) "build the shims" -- $(CARGO) build --release -p shim
	$(STEP) "containerd benchmark" -- $(CARGO) run --release -p bench --bin bench-containerd

.PHONY: bench-template
bench-template: build guest ## Clones of a template beside boots and QEMU's restore; writes target/bench/template.json
	$(STEP) "install QEMU" -- scripts/setup qemu-system-x86
	$(STEP) "template benchmark" -- $(CARGO) run --release -p bench --bin bench-template

.PHONY: bench-wasm
bench-wasm: setup ## WebAssembly: compiling, starts, density and HTTP, beside wasmtime's CLI; writes target/bench/wasm.json
	-$(STEP) "get wasmtime's CLI, to compare with" -- scripts/wasmtime
	$(STEP) "WebAssembly benchmark" -- $(CARGO) run --release -p bench --bin bench-wasm

.PHONY: clean
clean: ## Remove build output (the guest cache stays; `kuasar-ctl guest info` says where)
	$(CARGO) clean
