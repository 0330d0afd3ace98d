// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/bulkheadhq/bulkhead/test/need"
	"github.com/bulkheadhq/bulkhead/test/rig"
)

// TestTenantLimitsHoldAgainstTwoSandboxes lowers a tenant's quota below what
// its two running sandboxes have reserved. Admission cannot take that back; the
// tenant's cgroup holds both of them together to the new limits.
func TestTenantLimitsHoldAgainstTwoSandboxes(t *testing.T) {
	root := need.CgroupV2(t)
	n := open(t)
	file := filepath.Join(n.TenantsDir, "pair.yaml")
	quota := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte("kind: Tenant\npath: pair\nquota: "+text+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		n.must("reload")
	}
	quota("{cpu: 2, memory: 256MiB}")
	t.Cleanup(func() {
		n.clear()
		if err := os.Remove(file); err != nil {
			t.Error(err)
		}
		n.must("reload")
	})
	names := []string{"pair-a", "pair-b"}
	for _, name := range names {
		n.must("run", "-d", "--name", name, "--tenant", "pair", "--cpus", "1", "--memory", "128MiB", python, "sleep", "3600")
	}
	quota("{cpu: 500m, memory: 64MiB}")
	n.refuse(1, []string{"no room for pair"}, "run", "--tenant", "pair", busybox, "true")

	const seconds = 6
	burn := fmt.Sprintf(`
import time
begin, used = time.monotonic(), time.process_time()
while time.monotonic() < begin + %d:
    pass
print(time.process_time() - used)
`, seconds)
	var wg sync.WaitGroup
	var got [2]float64
	for i, name := range names {
		wg.Go(func() {
			out := n.do("exec", name, "python3", "-c", burn)
			var err error
			if got[i], err = strconv.ParseFloat(strings.TrimSpace(out.out), 64); err != nil {
				t.Errorf("burn in %s: %s", name, out)
			}
		})
	}
	wg.Wait()
	if share := (got[0] + got[1]) / seconds; share > 0.6 {
		t.Errorf("two sandboxes of a tenant with 0.5 cores used %.2f together", share)
	}

	slice := filepath.Join(root, rig.Slice, "pair")
	grab := "import time; data = bytearray(48 << 20); print('has it', flush=True); time.sleep(5)"
	var out [2]result
	for i, name := range names {
		wg.Go(func() { out[i] = n.do("exec", name, "python3", "-c", grab) })
	}
	wg.Wait()
	if out[0].code == 0 && out[1].code == 0 {
		t.Errorf("two sandboxes of a tenant with 64 MiB hold 96 MiB: %s, %s", out[0], out[1])
	}
	if v := cgroupValue(t, filepath.Join(slice, "memory.max")); v != 64<<20 {
		t.Errorf("memory.max of the tenant: %d", v)
	}
	events, err := os.ReadFile(filepath.Join(slice, "memory.events"))
	if err != nil || !strings.Contains(string(events), "oom_kill ") || strings.Contains(string(events), "oom_kill 0\n") {
		t.Errorf("memory.events of the tenant: %q, %v; want an OOM kill", events, err)
	}
}

func cgroupValue(t *testing.T, path string) int {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	return number(strings.TrimSpace(string(data)))
}
