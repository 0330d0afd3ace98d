#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs test stages one after the other and closes with a summary. A stage that
# fails does not stop the next; the exit status says whether all passed.
#
# usage: test/run.sh vet|unit|node|vm|fuzz ...
set -uo pipefail
cd "$(dirname "$0")/.."

# A skipped test is a failed one: a green run means that everything ran.
export CI=true
export BULKHEAD_BIN=${BULKHEAD_BIN:-$PWD/build/bin}

# Packages whose tests change the machine: they need root.
node='/(agent|agent/api|bpf|cgroups|netpol/enforce|netpol/link|runtime/containerd|test/.*)$'
# SQLite in Go takes minutes to compile for the race detector.
norace='/(gateway|gateway/(ingest|ledger)|test)$'

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
names=() states=() times=()

# select RE: packages that match; reject RE: those that do not.
packages=$(go list ./...) || exit 1
select_packages() { grep -E "$1" <<<"$packages"; }
reject_packages() { grep -vE "$1" <<<"$packages"; }

go_test() { # FLAGS... PACKAGES on stdin
	local list
	mapfile -t list
	[ ${#list[@]} -eq 0 ] && return
	go test -p 2 "$@" "${list[@]}" 2>&1 | grep -v '\[no test files\]$'
	return "${PIPESTATUS[0]}"
}

stage_vet() { go vet ./...; }

stage_unit() {
	local pure failed=0
	pure=$(reject_packages "$node")
	grep -vE "$norace" <<<"$pure" | go_test -race -timeout 5m || failed=1
	grep -E "$norace" <<<"$pure" | go_test -timeout 5m || failed=1
	return $failed
}

stage_node() {
	if [ "$(id -u)" -ne 0 ]; then
		echo "the node tier needs root"
		return 1
	fi
	select_packages "$node" | go_test -count=1 -timeout 10m
}

stage_vm() { go run ./test/vm all; }

stage_fuzz() {
	local file target failed=0
	while IFS=: read -r file target; do
		echo "fuzz ./$(dirname "$file") $target"
		go test "./$(dirname "$file")" -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-20s}" 2>&1 | tail -n 2
		[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
	done < <(git grep --untracked -oE '^func Fuzz[A-Za-z0-9_]+' -- '*_test.go' | sed 's/:func /:/')
	echo "the program in the kernel against the reference evaluator, ${FUZZCASES:-10000000} cases"
	BULKHEAD_FUZZ_CASES=${FUZZCASES:-10000000} go test -count=1 -timeout 60m -run '^TestProgramAgainstReference$' -v ./netpol/enforce || failed=1
	return $failed
}

# report prints the closing table, and of a failed stage the lines that say what.
report() {
	local i
	printf '\n%-6s %-6s %8s\n' STAGE RESULT SECONDS
	for i in "${!names[@]}"; do
		printf '%-6s %-6s %8d\n' "${names[i]}" "${states[i]}" "${times[i]}"
		[ "${states[i]}" = ok ] || grep -E '^( {4})?(--- FAIL: [^/]*$|FAIL[[:space:]]|panic:|vm: .*FAIL)' "$logs/${names[i]}" | sort -u | head -n 20 | sed 's/^ */       /'
	done
}

status=0
for stage in "$@"; do
	printf '\n=== %s\n' "$stage"
	start=$SECONDS
	state=ok
	"stage_$stage" 2>&1 | tee "$logs/$stage"
	if [ "${PIPESTATUS[0]}" -ne 0 ]; then
		state=FAIL status=1
	fi
	names+=("$stage") states+=("$state") times+=($((SECONDS - start)))
done
report
exit $status
