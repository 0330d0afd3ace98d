// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// cgroupFile reads a file of a task's cgroup, by its name under v1 (controller
// and file) or v2.
func cgroupFile(t testing.TB, path, controller, v1, v2 string) string {
	t.Helper()
	for _, p := range []string{
		filepath.Join("/sys/fs/cgroup", controller, path, v1),
		filepath.Join("/sys/fs/cgroup", path, v2),
	} {
		if b, err := os.ReadFile(p); err == nil {
			return strings.TrimSpace(string(b))
		}
	}
	t.Fatalf("neither %s of v1 nor %s of v2 in %s", v1, v2, path)
	return ""
}

// TestLimitsAreSet: before the command starts, in the cgroup that was given.
func TestLimitsAreSet(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sleep", "1000")
	s.CPUMillis, s.MemoryBytes, s.PIDs = 1500, 64<<20, 33
	task, err := r.Create(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ controller, v1, v2, want1, want2 string }{
		{"cpu", "cpu.cfs_quota_us", "cpu.max", "150000", "150000 100000"},
		{"memory", "memory.limit_in_bytes", "memory.max", "67108864", "67108864"},
		{"memory", "memory.memsw.limit_in_bytes", "memory.swap.max", "67108864", "0"},
		{"pids", "pids.max", "pids.max", "33", "33"},
	} {
		if got := cgroupFile(t, s.CgroupPath, c.controller, c.v1, c.v2); got != c.want1 && got != c.want2 {
			t.Errorf("%s: got %s, want %s", c.v1, got, c.want1)
		}
	}
	if err := task.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestOutOfMemory(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sh", "-c", "tail /dev/zero; exit 3")
	s.MemoryBytes = 32 << 20
	exit, _, _ := runOut(t, r, s)
	// On cgroup v1 the kernel takes the largest process, which is not the
	// first; on v2 the sandbox ends whole.
	want := uint32(3)
	if readHostLimits().unified {
		want = 137
	}
	if exit.Code != want || !exit.OOMKilled {
		t.Errorf("got %+v, want exit %d, out of memory", exit, want)
	}
	s = newSpec(t, r, "tail", "/dev/zero")
	s.MemoryBytes = 32 << 20
	if exit, _, _ = runOut(t, r, s); exit.Code != 137 || !exit.OOMKilled {
		t.Errorf("got %+v, want exit 137, out of memory", exit)
	}
	// SIGKILL alone is not that.
	s = newSpec(t, r, "sleep", "1000")
	s.MemoryBytes = 32 << 20
	task := launch(t, r, s)
	if err := task.Kill(t.Context(), 9, true); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, task); exit.Code != 137 || exit.OOMKilled {
		t.Errorf("got %+v, want exit 137, not out of memory", exit)
	}
}

func TestTooManyProcesses(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sh", "-c", "for i in $(seq 100); do sleep 5 & done 2>/dev/null; echo not reached")
	s.PIDs = 20
	begin := time.Now()
	_, out, _ := runOut(t, r, s)
	if strings.Contains(out, "not reached") {
		t.Errorf("100 processes with a limit of 20, after %s", time.Since(begin))
	}
}
