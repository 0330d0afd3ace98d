// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/need"
)

func TestEnsureWritesLimits(t *testing.T) {
	tree := open(t)
	must(t, tree.Ensure("acme/vision", Limits{CPUMillis: 1500, MemoryBytes: 256 << 20, PIDs: 100}))
	must(t, tree.Ensure("acme/vision", Limits{CPUMillis: 1500, MemoryBytes: 256 << 20, PIDs: 100}))
	check := func(cpu2, cpu1, mem2, mem1, pids string) {
		t.Helper()
		for _, c := range []struct{ got, want string }{
			{fileOf(t, tree, "cpu", "acme/vision", "cpu.max", "cpu.cfs_quota_us"), pick(tree, "cpu", cpu2, cpu1)},
			{fileOf(t, tree, "memory", "acme/vision", "memory.max", "memory.limit_in_bytes"), pick(tree, "memory", mem2, mem1)},
			{fileOf(t, tree, "pids", "acme/vision", "pids.max", "pids.max"), pids},
		} {
			if c.got != c.want {
				t.Errorf("control file says %q, want %q", c.got, c.want)
			}
		}
	}
	check("150000 100000", "150000", "268435456", "268435456", "100")
	// Up, down, and off again.
	must(t, tree.Ensure("acme/vision", Limits{CPUMillis: 2500, MemoryBytes: 512 << 20, PIDs: 200}))
	check("250000 100000", "250000", "536870912", "536870912", "200")
	must(t, tree.Ensure("acme/vision", Limits{CPUMillis: 10, MemoryBytes: 128 << 20, PIDs: 1}))
	check("1000 100000", "1000", "134217728", "134217728", "1")
	must(t, tree.Ensure("acme/vision", Limits{}))
	check("max 100000", "-1", "max", unlimitedV1(t, tree), "max")
	// The parent was made without limits.
	if got, want := fileOf(t, tree, "pids", "acme", "pids.max", "pids.max"), "max"; got != want {
		t.Errorf("parent's pids.max = %q, want %q", got, want)
	}
}

func pick(tree *Tree, controller, v2, v1 string) string {
	if tree.onV2(controller) {
		return v2
	}
	return v1
}

// unlimitedV1 is what a v1 memory cgroup without a limit says.
func unlimitedV1(t *testing.T, tree *Tree) string {
	root, ok := tree.onV1("memory")
	if !ok {
		return ""
	}
	s, err := readText(filepath.Join(root, "memory.limit_in_bytes"))
	must(t, err)
	return s
}

func TestEnsureErrors(t *testing.T) {
	tree := open(t)
	for path, l := range map[string]Limits{
		"":               {},
		"acme/":          {},
		"/acme":          {},
		"acme/../../etc": {},
		"acme/sb.x":      {},
		"a b":            {},
		"negative":       {MemoryBytes: -1},
		"tiny":           {CPUMillis: 9},
		"huge":           {CPUMillis: 1 << 40},
	} {
		if err := tree.Ensure(path, l); err == nil {
			t.Errorf("Ensure(%q, %+v) = nil, want an error", path, l)
		}
	}
	if leaves, err := tree.List(); err != nil || len(leaves) != 0 {
		t.Errorf("List = %v, %v, want none", leaves, err)
	}
}

func TestPIDsLimitOfTenantHolds(t *testing.T) {
	tree := open(t)
	if _, ok := tree.pidsNode(""); !ok {
		t.Skip("no pids controller")
	}
	must(t, tree.Ensure("acme", Limits{PIDs: 20}))
	must(t, tree.Ensure("acme/vision", Limits{}))
	j := start(t, tree, "acme/vision", "forker", "fork", nil)
	// Threads count too, so how many forks it takes is not fixed; it must end.
	err := j.wait(t)
	if err == nil || !strings.Contains(err.Error(), "exit status") {
		t.Errorf("job ended with %v, want a refused fork", err)
	}
}

func TestMemoryLimitOfTenantHolds(t *testing.T) {
	tree := open(t)
	if tree.Mode() == Hybrid {
		if _, ok := tree.onV1("memory"); !ok {
			t.Skip("no memory controller")
		}
	}
	must(t, tree.Ensure("acme", Limits{MemoryBytes: 48 << 20}))
	must(t, tree.Ensure("acme/vision", Limits{}))
	j := start(t, tree, "acme/vision", "eater", "eat", nil)
	if err := j.wait(t); signalled(err) != unix.SIGKILL {
		t.Fatalf("job ended with %v, want SIGKILL", err)
	}
	s, err := tree.Stat("acme/vision", "eater")
	must(t, err)
	if s.OOMKills == nil || *s.OOMKills == 0 {
		t.Errorf("OOM kills = %v, want some", s.OOMKills)
	}
	if s.MemoryPeak == nil || *s.MemoryPeak < 8<<20 || *s.MemoryPeak > 64<<20 {
		t.Errorf("memory peak = %v, want about 48 MiB", s.MemoryPeak)
	}
}

func TestCPULimitOfTenantHolds(t *testing.T) {
	tree := open(t)
	if _, ok := tree.onV1("cpu"); !ok && !tree.onV2("cpu") {
		t.Skip("no cpu controller")
	}
	must(t, tree.Ensure("acme", Limits{CPUMillis: 100}))
	start(t, tree, "acme", "spinner", "spin", nil)
	before, err := tree.Stat("acme", "spinner")
	must(t, err)
	begin := time.Now()
	time.Sleep(600 * time.Millisecond)
	after, err := tree.Stat("acme", "spinner")
	must(t, err)
	used, wall := time.Duration(after.CPUUsec-before.CPUUsec)*time.Microsecond, time.Since(begin)
	if used == 0 || used > wall/4 {
		t.Errorf("used %s of CPU in %s, want about a tenth", used, wall)
	}
}

func TestStat(t *testing.T) {
	tree := open(t)
	must(t, tree.Ensure("acme", Limits{}))
	if _, err := tree.Stat("acme", "none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Stat of nothing = %v, want fs.ErrNotExist", err)
	}
	start(t, tree, "acme", "spinner", "spin", nil)
	var last uint64
	for range 5 {
		time.Sleep(20 * time.Millisecond)
		s, err := tree.Stat("acme", "spinner")
		must(t, err)
		if s.CPUUsec < last || s.CPUUsec == 0 {
			t.Errorf("CPU went from %d to %d", last, s.CPUUsec)
		}
		last = s.CPUUsec
		if _, ok := tree.pidsNode(""); ok && (s.PIDs == nil || *s.PIDs == 0) {
			t.Errorf("PIDs = %v, want some", s.PIDs)
		}
		if tree.onV2("memory") || tree.v1["memory"] != "" {
			if s.MemoryCurrent == nil || *s.MemoryCurrent == 0 || s.OOMKills == nil || *s.OOMKills != 0 {
				t.Errorf("memory = %v, OOM kills %v", s.MemoryCurrent, s.OOMKills)
			}
		}
		if tree.onV2("cpu") || tree.v1["cpu"] != "" {
			if s.CPUThrottledUsec == nil || *s.CPUThrottledUsec != 0 {
				t.Errorf("throttled = %v, want a zero that was read", s.CPUThrottledUsec)
			}
		}
	}
}

// TestStatOfPartOfALeaf: where a hierarchy lacks the leaf, its figure is an
// error and not zero.
func TestStatOfPartOfALeaf(t *testing.T) {
	tree := open(t)
	if tree.Mode() != Hybrid {
		t.Skip("a unified leaf has no parts")
	}
	for _, c := range []string{"cpuacct", "memory", "pids"} {
		root, ok := tree.onV1(c)
		if !ok {
			continue
		}
		makeLeaf(t, tree, "acme", c)
		dir, err := leafDir("acme", c)
		must(t, err)
		must(t, unix.Rmdir(filepath.Join(root, dir)))
		if s, err := tree.Stat("acme", c); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("without %s: %+v, %v, want fs.ErrNotExist", c, s, err)
		}
		must(t, tree.Remove("acme", c))
	}
}

func TestKillAndRemove(t *testing.T) {
	tree := open(t)
	must(t, tree.Ensure("acme/vision", Limits{PIDs: 200}))
	j := start(t, tree, "acme/vision", "forker", "fork", nil)
	waitFor(t, func() bool {
		pids, err := tree.Procs("acme/vision", "forker")
		must(t, err)
		return len(pids) > 10
	})
	if err := tree.Remove("acme/vision", "forker"); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("Remove of a living sandbox = %v, want ErrNotEmpty", err)
	}
	if err := tree.Prune("acme/vision"); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("Prune of a tenant with a sandbox = %v, want ErrNotEmpty", err)
	}
	must(t, tree.Kill("acme/vision", "forker"))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	must(t, tree.WaitEmpty(ctx, "acme/vision", "forker"))
	if err := j.wait(t); signalled(err) != unix.SIGKILL {
		t.Errorf("job ended with %v, want SIGKILL", err)
	}
	for range 2 { // both are idempotent
		must(t, tree.Remove("acme/vision", "forker"))
		must(t, tree.Kill("acme/vision", "forker"))
		must(t, tree.WaitEmpty(ctx, "acme/vision", "forker"))
	}
	must(t, tree.Prune("acme/vision"))
	must(t, tree.Prune("acme/vision"))
	must(t, tree.Prune("acme"))
}

func waitFor(t *testing.T, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come about")
		}
	}
}

// TestKillFindsEveryHierarchy: processes that are only in one hierarchy, and
// in cgroups that the sandbox made below its own, are found and killed.
func TestKillFindsEveryHierarchy(t *testing.T) {
	tree := open(t)
	for i, root := range tree.hierarchies {
		id := "only" + strconv.Itoa(i)
		j := start(t, tree, "acme", id, "sleep", func(r string) bool { return r == root })
		dir, err := leafDir("acme", id)
		must(t, err)
		nested := filepath.Join(root, dir, "made-inside")
		must(t, makeDir(nested))
		initCpuset(t, root, nested)
		must(t, writeFile(filepath.Join(nested, "cgroup.procs"), strconv.Itoa(j.cmd.Process.Pid)))
		got, err := tree.Procs("acme", id)
		must(t, err)
		if d := cmp.Diff([]int{j.cmd.Process.Pid}, got); d != "" {
			t.Errorf("%s: processes (-want +got):\n%s", root, d)
		}
		must(t, tree.Kill("acme", id))
		if err := j.wait(t); signalled(err) != unix.SIGKILL {
			t.Errorf("%s: job ended with %v, want SIGKILL", root, err)
		}
		must(t, tree.Remove("acme", id))
	}
}

func TestKillEach(t *testing.T) { // the way of old kernels, on whatever there is
	tree := open(t)
	j := start(t, tree, "acme", "forker", "fork", nil)
	waitFor(t, func() bool {
		pids, err := tree.Procs("acme", "forker")
		must(t, err)
		return len(pids) > 5
	})
	dir, err := leafDir("acme", "forker")
	must(t, err)
	must(t, killEach(filepath.Join(tree.v2, dir)))
	if err := j.wait(t); signalled(err) != unix.SIGKILL {
		t.Errorf("job ended with %v, want SIGKILL", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	must(t, tree.WaitEmpty(ctx, "acme", "forker"))
}

func TestFreeze(t *testing.T) {
	tree := open(t)
	if err := tree.Freeze("acme", "none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Freeze of nothing = %v, want fs.ErrNotExist", err)
	}
	must(t, tree.Thaw("acme", "none"))
	for name, only := range map[string]func(string) bool{
		"everywhere": nil,
		"not on v2":  func(root string) bool { return root != tree.v2 }, // a runtime that joins v1 alone
	} {
		if only != nil && tree.v1["freezer"] == "" {
			continue
		}
		id := strings.ReplaceAll(name, " ", "-")
		j := start(t, tree, "acme", id, "spin", only)
		used := func() uint64 {
			t.Helper()
			s, err := tree.Stat("acme", id)
			must(t, err)
			return s.CPUUsec
		}
		waitFor(t, func() bool { return used() > 0 })
		must(t, tree.Freeze("acme", id))
		frozen, err := tree.Frozen("acme", id)
		if err != nil || !frozen {
			t.Errorf("%s: Frozen = %t, %v", name, frozen, err)
		}
		before := used()
		time.Sleep(50 * time.Millisecond)
		if after := used(); after != before {
			t.Errorf("%s: frozen, and used %d us", name, after-before)
		}
		must(t, tree.Thaw("acme", id))
		frozen, err = tree.Frozen("acme", id)
		if err != nil || frozen {
			t.Errorf("%s: Frozen after Thaw = %t, %v", name, frozen, err)
		}
		waitFor(t, func() bool { return used() > before })
		must(t, tree.Freeze("acme", id)) // Kill works on the frozen
		must(t, tree.Kill("acme", id))
		if err := j.wait(t); signalled(err) != unix.SIGKILL {
			t.Errorf("%s: job ended with %v, want SIGKILL", name, err)
		}
	}
}

func TestWaitEmptyHeedsContext(t *testing.T) {
	tree := open(t)
	start(t, tree, "acme", "sleeper", "sleep", nil)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if err := tree.WaitEmpty(ctx, "acme", "sleeper"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("WaitEmpty = %v, want context.DeadlineExceeded", err)
	}
}

func TestPressure(t *testing.T) {
	tree := open(t)
	if _, err := tree.Pressure("acme", "none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Pressure of nothing = %v, want fs.ErrNotExist", err)
	}
	makeLeaf(t, tree, "acme", "leaf")
	p, err := tree.Pressure("acme", "leaf")
	must(t, err)
	for name, s := range map[string]*Stall{"cpu": p.CPU, "memory": p.Memory, "io": p.IO} {
		if s != nil && s.SomeUsec != 0 {
			t.Errorf("%s pressure of an empty leaf = %+v", name, *s)
		}
	}
}

func TestList(t *testing.T) {
	tree := open(t)
	must(t, tree.Ensure("acme/vision/train", Limits{}))
	must(t, tree.Ensure("empty", Limits{}))
	want := []Leaf{{"acme", "b"}, {"acme/_x", "a"}, {"acme/tasks", "a"}, {"acme/vision/train", "a"}}
	for _, l := range want {
		must(t, tree.Ensure(l.Tenant, Limits{}))
		makeLeaf(t, tree, l.Tenant, l.ID)
	}
	must(t, makeDir(filepath.Join(tree.v2, "not.ours")))
	defer os.Remove(filepath.Join(tree.v2, "not.ours"))
	got, err := tree.List()
	must(t, err)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("leaves (-want +got):\n%s", d)
	}
	// One that only a single hierarchy has is found and removed.
	last := tree.hierarchies[len(tree.hierarchies)-1]
	must(t, os.MkdirAll(filepath.Join(last, "half", "sb.gone"), 0o755))
	got, err = tree.List()
	must(t, err)
	if !slices.Contains(got, Leaf{"half", "gone"}) {
		t.Errorf("List = %v, lacks the half-made leaf", got)
	}
	must(t, tree.Remove("half", "gone"))
	must(t, tree.Prune("half"))
}

func TestReopen(t *testing.T) {
	tree := open(t)
	must(t, tree.Ensure("acme", Limits{PIDs: 7}))
	makeLeaf(t, tree, "acme", "a")
	must(t, tree.Close())
	again, err := Open(Config{AllowPartial: true, Slice: filepath.Base(tree.v2)})
	must(t, err)
	got, err := again.List()
	must(t, err)
	if d := cmp.Diff([]Leaf{{"acme", "a"}}, got); d != "" {
		t.Errorf("leaves after reopening (-want +got):\n%s", d)
	}
	if got, want := again.LeafPath("acme", "a"), "/"+filepath.Base(tree.v2)+"/acme/sb.a"; got != want {
		t.Errorf("LeafPath = %q, want %q", got, want)
	}
}

func TestDelegatedRoot(t *testing.T) {
	base := open(t)
	must(t, base.Ensure("delegated", Limits{}))
	tree := openAt(t, Config{AllowPartial: true, Root: filepath.Join(base.v2, "delegated"), Slice: "inner.slice"})
	must(t, tree.Ensure("acme", Limits{CPUMillis: 100}))
	want := "/" + filepath.Base(base.v2) + "/delegated/inner.slice/acme/sb.a"
	if got := tree.LeafPath("acme", "a"); got != want {
		t.Errorf("LeafPath = %q, want %q", got, want)
	}
	if _, err := os.Stat(filepath.Join(base.v2, "delegated/inner.slice/acme")); err != nil {
		t.Error(err)
	}
}

// TestHybridQuota: cgroup v1 wants every quota within its parent's.
func TestHybridQuota(t *testing.T) {
	tree := open(t)
	root, ok := tree.onV1("cpu")
	if !ok {
		t.Skip("the cpu controller is not on cgroup v1")
	}
	quota := func(dir string) int64 {
		t.Helper()
		q, err := quotaV1(filepath.Join(root, dir))
		must(t, err)
		return q
	}
	must(t, tree.Ensure("acme", Limits{CPUMillis: 2000}))
	must(t, tree.Ensure("acme/vision", Limits{CPUMillis: 4000}))
	if got, want := quota("acme/vision"), int64(200_000); got != want {
		t.Errorf("child's quota = %d, want the parent's %d", got, want)
	}
	makeLeaf(t, tree, "acme/vision", "a")
	leaf := filepath.Join(root, "acme/vision/sb.a")
	must(t, writeFile(filepath.Join(leaf, "cpu.cfs_period_us"), "50000"))
	must(t, writeFile(filepath.Join(leaf, "cpu.cfs_quota_us"), "75000"))
	must(t, tree.Ensure("acme", Limits{CPUMillis: 1000}))
	for _, dir := range []string{"acme", "acme/vision", "acme/vision/sb.a"} {
		if got, want := quota(dir), int64(100_000); got != want {
			t.Errorf("quota of %s after lowering = %d, want %d", dir, got, want)
		}
	}
}

func TestOpenSaysWhatIsMissing(t *testing.T) {
	need.Root(t)
	cfg := Config{Slice: "bulkhead-test-refused.slice"}
	tree, err := Open(cfg)
	if err == nil {
		clean(t, tree)
		if tree.Mode() != Unified {
			t.Error("Open accepted a hybrid host without AllowPartial")
		}
		return
	}
	for _, want := range []string{"open cgroups: cgroup v2 at ", " lacks ", "memory", "systemd.unified_cgroup_hierarchy=1 or set cgroups.allow_partial = true"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q lacks %q", err, want)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error %q is not one line", err)
	}
	hybrid := open(t)
	if hybrid.Mode() == Hybrid && len(hybrid.NotEnforced()) == 0 {
		t.Error("a hybrid host enforces everything, it says")
	}
	t.Logf("mode %s, not enforced: %q", hybrid.Mode(), hybrid.NotEnforced())
}

func BenchmarkStat(b *testing.B) {
	tree := open(b)
	makeLeaf(b, tree, "acme", "a")
	for b.Loop() {
		if _, err := tree.Stat("acme", "a"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEnsure(b *testing.B) {
	tree := open(b)
	for b.Loop() {
		must(b, tree.Ensure("acme/vision", Limits{CPUMillis: 1000, MemoryBytes: 1 << 30, PIDs: 100}))
	}
}
