// SPDX-License-Identifier: Apache-2.0

package systemd

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/bulkheadhq/bulkhead/test/need"
)

// needSystemd needs a machine that systemd runs, with unified cgroups.
func needSystemd(t *testing.T) {
	t.Helper()
	need.CgroupV2(t)
	comm, err := os.ReadFile("/proc/1/comm")
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(comm)) != "systemd" {
		t.Skip("needs systemd as PID 1; the vm tier runs this test")
	}
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestBasicTarget(t *testing.T) {
	needSystemd(t)
	if got := output(t, "systemctl", "--no-pager", "is-active", "basic.target"); got != "active" {
		t.Errorf("basic.target is %s, want active", got)
	}
	if got := output(t, "systemctl", "--no-pager", "--plain", "--no-legend", "list-units", "--failed"); got != "" {
		t.Errorf("failed units:\n%s", got)
	}
}
