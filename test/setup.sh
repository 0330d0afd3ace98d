#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Brings in what a part of the work needs and does not have. When nothing is
# missing it takes less than a second. Prints a line with seconds for each
# thing that it had to do.
#
# usage: test/setup.sh run|vm|generate|lint ...
set -euo pipefail
cd "$(dirname "$0")/.."

bin=build/bin
stamps=build/stamps
mkdir -p "$bin" "$stamps"

# step NAME COMMAND...: runs it, shows its output only if it fails.
step() {
	local name=$1 start=$SECONDS log
	shift
	log=$(mktemp)
	printf 'setup: %s ...\n' "$name"
	if ! "$@" >"$log" 2>&1 </dev/null; then
		cat "$log" >&2
		rm -f "$log"
		printf 'setup: %s FAILED after %ds\n' "$name" $((SECONDS - start)) >&2
		exit 1
	fi
	rm -f "$log"
	printf 'setup: %s done in %ds\n' "$name" $((SECONDS - start))
}

refresh_lists() { apt-get -q update; }

install_packages() {
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@"
}

# packages NAME...: installs the missing ones.
packages() {
	local missing=() p
	if ! command -v dpkg-query >/dev/null; then
		echo "setup: not a Debian system; install what these packages hold yourself: $*" >&2
		return
	fi
	for p in "$@"; do
		case $(dpkg-query -W -f='${Status}' "$p" 2>/dev/null) in
		'install ok installed') ;;
		*) missing+=("$p") ;;
		esac
	done
	[ ${#missing[@]} -eq 0 ] && return
	if [ "$(id -u)" -ne 0 ]; then
		echo "setup: run as root: apt-get install --no-install-recommends ${missing[*]}" >&2
		exit 1
	fi
	step "package lists" refresh_lists
	step "packages ${missing[*]}" install_packages "${missing[@]}"
}

# once STAMP FILE... -- NAME COMMAND...: runs the step if the contents of the
# files, or this script's idea of the stamp, changed since it last worked.
once() {
	local stamp=$stamps/$1 files=() now
	shift
	while [ "$1" != -- ]; do
		files+=("$1")
		shift
	done
	shift
	now=$(cat "${files[@]}" | sha256sum)
	[ "$(cat "$stamp" 2>/dev/null)" = "$now" ] && return
	step "$@"
	echo "$now" >"$stamp"
}

make_images() {
	# The lists of a fresh container image are empty or old.
	go run ./test/images -out build/images -cache build/debs && return
	apt-get -q update
	go run ./test/images -out build/images -cache build/debs
}

for part in "$@"; do
	case $part in
	run) # containerd, runc, images and the benchmarks' rival: the demo, node tests, benchmarks
		packages gcc libc6-dev libseccomp-dev pkg-config nftables
		for program in containerd containerd-shim-runc-v2 ctr runc; do
			[ -x "$bin/$program" ] || rm -f "$stamps/tools"
		done
		once tools test/tools/go.mod test/tools/go.sum test/tools/build.sh -- \
			"containerd and runc" test/tools/build.sh "$bin"
		for image in busybox python; do
			[ -s "build/images/$image.tar" ] || rm -f "$stamps/images"
		done
		once images test/images/*.go -- "images" make_images
		;;
	vm) # guest kernels and the emulator
		packages qemu-system-x86 kmod systemd xz-utils cpio
		for version in 6.1 6.12; do
			[ -s "build/vm/kernel-$version/vmlinuz" ] || rm -f "$stamps/kernel-$version"
			once "kernel-$version" test/vm/kernel.sh -- "guest kernel $version" test/vm/kernel.sh build/vm "$version"
		done
		;;
	generate) # compilers whose version is part of their output
		packages clang-14 llvm-14 libbpf-dev linux-libc-dev protobuf-compiler
		once protoc-plugins go.mod -- "protoc plugins" \
			env CGO_ENABLED=0 go build -trimpath -o "$bin/" \
			google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
		;;
	lint)
		once "golangci-lint" test/golangci-lint.version -- "golangci-lint" \
			env CGO_ENABLED=0 GOBIN="$PWD/$bin" go install -trimpath -ldflags '-s -w' \
			"github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(cat test/golangci-lint.version)"
		;;
	*)
		echo "usage: test/setup.sh run|vm|generate|lint ..." >&2
		exit 2
		;;
	esac
done
