// SPDX-License-Identifier: Apache-2.0

package crash

import (
	"net/netip"
	"strconv"
	"syscall"
	"testing"

	"github.com/bulkheadhq/bulkhead/test/rig"
)

func number(s string) int {
	v, _ := strconv.Atoi(s)
	return v
}

// isAPI keeps the API host's packets in a capture.
func isAPI(a netip.Addr) bool { return a == rig.API4 || a == rig.API6 }

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}
