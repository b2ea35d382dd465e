# Everything one does with this tree. `make` alone lists it.
#
#   make run             a container in its sandbox, on a private containerd
#   make run CMD="…"     another command, e.g. CMD="sh -c 'id; ls /'"
#   make test            all tests, unit and end to end (the latter need root)
#   make e2e T=c041      end-to-end tests whose name has this in it
#   make e2e T=cri21     those on one containerd: cri16, cri17, cri21, cri23
#   make conformance     docs/conformance.md from the results of make e2e
#   make compatibility docs/compatibility.md: real programs under each profile, measured
#   make learned         servers under profiles that their own load made: docs/learning.md's table with WRITE=1
#   make vm-test         a part of e2e inside Debian's kernels 6.1 and 7.2, on cgroup v2, also with systemd, SELinux or no nf_tables
#   make kube-test       runtimeclass/ on a real API server; the first time it is built, a quarter of an hour
#   make nerdctl-test    a real nerdctl on three containerds, built from its Go module the first time
#   make cluster-machine-test  a node that is an emulated machine: systemd, cgroup v2, the systemd driver
#   make cluster-test    whole clusters with real kubelets: the DaemonSet installs and upgrades, pods run; built as that is
#   make check           formatting, lints, unit tests, licences and sources
#   make build           release binaries
#   make docs            what the pages tell to type, and their links, tried
#   make docs-tables     the pages of docs/ that are made of tables in the code
#   make probes          docs/security-probes.md: what attackers try, here and under runc
#   make bench           times and memory beside runc, crun, runsc
#   make image           the installer's image, one static program, as an OCI layout in dist/image
#   make reproduce       that image, built in two places: the same digest?
#   make dist            a release in dist/: casemate, which carries the others, checksums, component list

ARCH    := $(shell uname -m)
TARGET  := $(or $(CARGO_TARGET_DIR),target)/$(ARCH)-unknown-linux-gnu
CARGO   ?= cargo
QUICK   ?= --bins
T       ?=
CMD     ?=
BINARIES = casemate casemate-agent containerd-shim-casemate-v2

# One set of packages in every call of cargo: another set has other features, and what
# all stand on would be compiled once more for it. So what is built or tested is chosen
# by target: all tests but those of tests/tests, which have commands of their own.
BUILD    = $(CARGO) build --profile quick --locked --workspace
TEST     = $(CARGO) test --profile quick --locked --workspace
UNIT     = $(basename $(wildcard */tests/*.rs)) $(patsubst %/main.rs,%,$(filter-out tests/%,$(wildcard */tests/*/main.rs)))

VM_SUITES ?= bookworm bookworm:systemd bookworm:selinux bookworm:bare sid sid:systemd sid:selinux sid:bare

.PHONY: help build quick check lint unit deny test daemons e2e e2e-older conformance compat compatibility learned nerdctl-test kube kube-test cluster cluster-test cluster-machine-test vm-test docs docs-tables probes run bench image reproduce dist clean

help:
	@sed -n 's/^#   //p' Makefile

# No path of the machine that builds stays in what is released: so two machines can
# build the same. (Beside what .cargo/config.toml says, and not in its place.)
CARGO_HOME ?= $(HOME)/.cargo
build bench: export CARGO_TARGET_$(shell echo $(ARCH) | tr a-z A-Z)_UNKNOWN_LINUX_GNU_RUSTFLAGS = \
  --remap-path-prefix=$(CARGO_HOME)/registry/src=/crates --remap-path-prefix=$(CURDIR)=/casemate

build:
	$(CARGO) build --release --locked --workspace --bins --features casemate/kubernetes

# The profile that tests use: as release in behaviour, built in a fraction of
# the time.
quick:
	$(BUILD) $(QUICK)

check: lint unit deny

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --profile quick --locked --workspace --all-targets -- -D warnings

unit: quick
	$(TEST) --lib --bins $(addprefix --test ,$(notdir $(UNIT)))
	$(TEST) --doc

deny:
	@scripts/deny.sh

test: unit e2e e2e-older compat learned

# Other generations of containerd, and what the tests of CRI need.
daemons:
	@scripts/packages.sh
	@scripts/daemons.sh

e2e: quick daemons
	CASEMATE_TEST_BIN_DIR=$(abspath $(TARGET)/quick) \
	  $(TEST) --test e2e -- $(T)

conformance: quick
	$(TARGET)/quick/testbed conformance

# The ways that kernels before 6.17 need, on this one.
e2e-older: quick
	CASEMATE_TEST_BIN_DIR=$(abspath $(TARGET)/quick) CASEMATE_TEST_LIST=$(CURDIR)/tests/vm-trials.txt \
	  CASEMATE_CONFIG=$(CURDIR)/tests/older-kernel.toml \
	  $(TEST) --test e2e

# Real programs under each profile: some, or all of them and the page about it.
compat: quick
	CASEMATE_TEST_BIN_DIR=$(abspath $(TARGET)/quick) \
	  $(TEST) --test compat -- some $(T)

compatibility: quick
	CASEMATE_TEST_BIN_DIR=$(abspath $(TARGET)/quick) CASEMATE_WRITE_DOCS=$(if $(T),,1) \
	  $(TEST) --test compat -- all $(T)

# nginx, redis, PostgreSQL and a Python service, each under what it was learned to call.
learned: quick
	CASEMATE_TEST_BIN_DIR=$(abspath $(TARGET)/quick) CASEMATE_WRITE_DOCS=$(if $(T),,$(WRITE)) \
	  $(TEST) --test compat -- learned $(T)

vm-test: quick
	$(TEST) --test e2e --no-run
	$(TEST) --test kernel --no-run
	@TARGET=$(abspath $(TARGET)/quick) scripts/vm-test.sh $(VM_SUITES)

# The links of all pages, and what stands in blocks that say "sh test".
docs: quick
	$(TEST) --lib pages_
	CASEMATE_TEST_BIN_DIR=$(abspath $(TARGET)/quick) \
	  $(TEST) --test e2e -- pages_

# Without the build trials that need the server are skipped.
# The feature kubernetes needs some seventy crates more: its lints aren't in `make check`.
kube-test: quick
	@scripts/apiserver.sh
	$(CARGO) clippy --profile quick --locked -p casemate --features kubernetes -- -D warnings
	$(MAKE) kube

# casemate as `make dist` has it, where the server is there to ask.
kube: quick
	@[ ! -x target/kube/kube-apiserver ] || \
	  $(CARGO) build --profile quick --locked -p casemate --features kubernetes
	CASEMATE_TEST_BIN_DIR=$(abspath $(TARGET)/quick) \
	  $(TEST) --test kube -- $(T)

# Without the build these trials are skipped.
nerdctl-test: daemons
	@scripts/nerdctl.sh
	$(MAKE) e2e T=nerdctl

# etcd, API server, controllers, scheduler, kubelet, kubeadm and containerd, as nodes of their own.
# CONTAINERD=1.7 has another of the test bed's, KEEP=DIR the logs of all of them.
CONTAINERD ?= 2.1
KEEP       ?=
cluster-test: daemons
	@scripts/apiserver.sh
	$(MAKE) cluster

cluster: quick
	$(CARGO) build --profile quick --locked -p casemate --features kubernetes
	CASEMATE_TEST_BIN_DIR=$(abspath $(TARGET)/quick) CASEMATE_TEST_CLUSTER=$(CONTAINERD) \
	  CASEMATE_TEST_KEEP=$(KEEP) \
	  $(TEST) --test cluster -- $(T)

# A node that is an emulated machine, with systemd and cgroup v2. MACHINE=sid has another.
MACHINE ?= bookworm
cluster-machine-test: daemons
	@scripts/apiserver.sh
	@VM_SYSTEMD=1 scripts/vm.sh $(MACHINE)
	CASEMATE_TEST_MACHINE=$(MACHINE) $(MAKE) cluster

docs-tables:
	CASEMATE_WRITE_DOCS=1 $(TEST) --test documents --test surface
	CASEMATE_WRITE_DOCS=1 $(TEST) --bin casemate
	CASEMATE_WRITE_DOCS=1 $(TEST) --lib ledger

probes: quick
	@scripts/packages.sh
	CASEMATE_TEST_BIN_DIR=$(abspath $(TARGET)/quick) CASEMATE_WRITE_DOCS=1 \
	  $(TEST) --test e2e -- probes_

run:
	@CMD='$(subst ','\'',$(CMD))' scripts/run.sh

# scripts/peers.sh unpacks crun's library beside it, in no place that is searched.
bench: build
	CASEMATE_TEST_BIN_DIR=$(abspath $(TARGET)/release) \
	  LD_LIBRARY_PATH=$(CURDIR)/target/peers/root/usr/lib/$(ARCH)-linux-gnu \
	  $(CARGO) run --release --locked -p casemate-tests --bin bench -- --overhead runtimeclass/overhead.json $(ARGS)

# The installer's image, without a Docker daemon: SOURCE_DATE_EPOCH is that of its files.
image: build
	$(TARGET)/release/testbed image --from $(TARGET)/release --output dist/image

# Builds the image in two places, and compares.
reproduce:
	@scripts/reproduce.sh

dist: build
	rm -rf dist && mkdir -p dist
	cp $(addprefix $(TARGET)/release/,$(filter-out casemate,$(BINARIES))) dist/
	$(TARGET)/release/casemate carry --output dist/casemate
	cp LICENSE dist/ 2>/dev/null || true
	$(TARGET)/release/testbed sbom --output dist/casemate.cdx.json
	cd dist && sha256sum * > SHA256SUMS
	@ls -l dist

clean:
	$(CARGO) clean
	rm -rf dist
