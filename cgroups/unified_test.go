// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/need"
)

// openUnified answers a tree on a host that has everything on cgroup v2.
func openUnified(t *testing.T) *Tree {
	t.Helper()
	need.CgroupV2(t)
	return openAt(t, Config{})
}

func TestUnifiedEnforcesEverything(t *testing.T) {
	tree := openUnified(t)
	if tree.Mode() != Unified {
		t.Errorf("mode = %s, want unified", tree.Mode())
	}
	if got := tree.NotEnforced(); len(got) != 0 {
		t.Errorf("not enforced: %q, want nothing", got)
	}
	must(t, tree.Ensure("acme/vision", Limits{MemoryBytes: 64 << 20}))
	for _, dir := range []string{"", "acme", "acme/vision"} {
		have, err := readWords(filepath.Join(tree.v2, dir, "cgroup.subtree_control"))
		must(t, err)
		for _, c := range required {
			if !slices.Contains(have, c) {
				t.Errorf("%q does not hand on %s: %q", dir, c, have)
			}
		}
	}
	if got, err := readText(filepath.Join(tree.v2, "acme/vision/memory.swap.max")); err == nil && got != "0" {
		t.Errorf("memory.swap.max = %q, want 0", got)
	}
	makeLeaf(t, tree, "acme/vision", "a")
	s, err := tree.Stat("acme/vision", "a")
	must(t, err)
	if s.MemoryCurrent == nil || s.OOMKills == nil || s.PIDs == nil || s.CPUThrottledUsec == nil {
		t.Errorf("a unified host knows everything: %+v", s)
	}
}

// TestUnifiedChildMayHaveMore: v2 lets a child's limit be above its parent's.
func TestUnifiedChildMayHaveMore(t *testing.T) {
	tree := openUnified(t)
	must(t, tree.Ensure("acme/vision", Limits{CPUMillis: 4000}))
	must(t, tree.Ensure("acme", Limits{CPUMillis: 1000}))
	if got, want := fileOf(t, tree, "cpu", "acme/vision", "cpu.max", ""), "400000 100000"; got != want {
		t.Errorf("cpu.max = %q, want %q", got, want)
	}
}

// TestUnifiedProcessesInTheWay: a process in a node that must have children
// is named in the error.
func TestUnifiedProcessesInTheWay(t *testing.T) {
	tree := openUnified(t)
	node := filepath.Join(tree.v2, "acme")
	must(t, makeDir(node))
	cmd := exec.Command("/bin/sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	must(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	must(t, writeFile(filepath.Join(node, "cgroup.procs"), strconv.Itoa(cmd.Process.Pid)))
	err := tree.Ensure("acme", Limits{})
	if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "processes live in "+node) {
		t.Errorf("Ensure = %v, want EBUSY and why", err)
	}
	must(t, cmd.Process.Kill())
	_, _ = cmd.Process.Wait()
	must(t, tree.Ensure("acme", Limits{}))
}

func TestUnifiedDelegationWithoutControllers(t *testing.T) {
	root := need.CgroupV2(t)
	bare := filepath.Join(root, "bulkhead-test-bare-"+strconv.Itoa(os.Getpid()))
	must(t, makeDir(bare))
	defer os.Remove(bare)
	inner := filepath.Join(bare, "inner")
	must(t, makeDir(inner)) // its parent hands nothing on
	defer os.Remove(inner)
	_, err := Open(Config{Root: inner})
	if err == nil || !strings.Contains(err.Error(), "lacks cpu, io, memory, pids") {
		t.Errorf("Open = %v, want the missing controllers", err)
	}
	tree := openAt(t, Config{Root: inner, AllowPartial: true})
	if got := tree.NotEnforced(); len(got) < 4 {
		t.Errorf("not enforced: %q, want cpu, memory, pids and io", got)
	}
	must(t, tree.Ensure("acme", Limits{CPUMillis: 100, MemoryBytes: 1 << 20, PIDs: 3}))
	makeLeaf(t, tree, "acme", "a")
	s, err := tree.Stat("acme", "a")
	must(t, err)
	if s.MemoryCurrent != nil || s.PIDs != nil || s.OOMKills != nil || s.CPUThrottledUsec != nil {
		t.Errorf("figures without a controller: %+v, want nil", s)
	}
}
