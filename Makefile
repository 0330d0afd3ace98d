# SPDX-License-Identifier: Apache-2.0

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := build/bin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# How long each fuzz target runs in `make fuzz`.
FUZZTIME ?= 20s

export BULKHEAD_BIN := $(CURDIR)/$(BIN)

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## fetch and build what the demo and the tests need (root; Debian 12)
	@test/setup.sh run

.PHONY: setup-vm
setup-vm: ## the same for the guest: qemu and a kernel
	@test/setup.sh vm

.PHONY: build
build: ## build every program into build/bin
	@mkdir -p $(BIN)
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' -o $(BIN)/ ./cmd/...

.PHONY: generate
generate: ## regenerate BPF objects and protobuf code
	@test/setup.sh generate
	test/generate.sh

.PHONY: lint
lint: ## golangci-lint, gofmt included
	@test/setup.sh lint
	$(BIN)/golangci-lint run --allow-parallel-runners

.PHONY: test
test: setup setup-vm build ## everything: vet, unit, node and vm tiers (root)
	@test/run.sh vet unit node vm

.PHONY: test-unit
test-unit: ## tests that need nothing of the machine, with the race detector
	@test/run.sh vet unit

.PHONY: test-node
test-node: setup build ## tests on the real containerd, BPF and network namespaces (root)
	@test/run.sh node

.PHONY: test-vm
test-vm: setup setup-vm build ## tests in a guest with unified cgroup v2, and with systemd
	@test/run.sh vm

.PHONY: demo
demo: setup build ## two tenants on this machine, end to end (root)
	go run ./test/demo

.PHONY: demo-vm
demo-vm: setup setup-vm build ## the demo in a guest with unified cgroup v2
	go run ./test/vm demo

.PHONY: bench
bench: setup build ## measure; BENCH=regexp chooses, CHECK=1 compares with the accepted numbers
	go run ./test/bench

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME each; the BPF program against the evaluator, 10 million cases (root)
	@FUZZTIME=$(FUZZTIME) test/run.sh fuzz

.PHONY: clean
clean: ## remove everything that was built or fetched
	rm -rf build
