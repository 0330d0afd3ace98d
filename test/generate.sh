#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Regenerates committed code with the compilers whose output it is: clang 14 and
# protoc 3.21.12, Debian 12's. Another version would change every line.
set -euo pipefail
cd "$(dirname "$0")/.."

for pair in "clang-14:version 14.0.6" "protoc:libprotoc 3.21.12"; do
	program=${pair%%:*} want=${pair#*:}
	got=$("$program" --version | head -n 1)
	case $got in
	*"$want"*) ;;
	*) echo "generate: $program says '$got', want '$want'" >&2 && exit 1 ;;
	esac
done

# bpf2go calls clang and llvm-strip; a host may have others under those names.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$(command -v clang-14)" "$links/clang"
ln -s "$(command -v llvm-strip-14)" "$links/llvm-strip"
export PATH="$links:$PWD/build/bin:$PATH"

go generate ./bpf
protoc --go_out=. --go_opt=module=github.com/bulkheadhq/bulkhead \
	--go-grpc_out=. --go-grpc_opt=module=github.com/bulkheadhq/bulkhead proto/*/v1/*.proto
