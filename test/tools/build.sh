#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the container runtime that the tests and the demo run: containerd, its
# runc shim, ctr and runc, at the versions that go.mod beside this file pins.
# They live in a module of their own so that their dependencies stay out of the
# product's go.mod.
#
# usage: build.sh OUTDIR
set -euo pipefail

mkdir -p "${1:?usage: build.sh OUTDIR}"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")"

version() { go list -m -f '{{.Version}}' "$1"; }

# Built beside the old ones and moved over them: a test that is running keeps
# the file that it started.
tmp=$(mktemp -d "$out/.tools.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

containerd=github.com/containerd/containerd/v2
# Bulkhead uses no CRI and only the overlay snapshotter; without the rest the
# build takes a third of the time.
CGO_ENABLED=0 go build -mod=readonly -trimpath -buildvcs=false \
	-tags "no_cri no_btrfs no_zfs no_devmapper osusergo netgo" \
	-ldflags "-s -w -X $containerd/version.Version=$(version $containerd)" \
	-o "$tmp/" "$containerd/cmd/containerd" "$containerd/cmd/ctr" "$containerd/cmd/containerd-shim-runc-v2"

# runc's version comes from a file inside its own module.
CGO_ENABLED=1 go build -mod=readonly -trimpath -buildvcs=false \
	-tags "seccomp urfave_cli_no_docs" -ldflags "-s -w" \
	-o "$tmp/" github.com/opencontainers/runc

mv -f "$tmp"/* "$out/"
