// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNames(t *testing.T) {
	for tenant, want := range map[string]string{
		"acme":                      "acme/sb.k3jx",
		"acme/vision/train":         "acme/vision/train/sb.k3jx",
		"tasks":                     "_tasks/sb.k3jx",
		"_tasks":                    "__tasks/sb.k3jx",
		"acme/notify_on_release/_a": "acme/_notify_on_release/__a/sb.k3jx",
	} {
		got, err := leafDir(tenant, "k3jx")
		if err != nil || got != want {
			t.Errorf("leafDir(%q) = %q, %v, want %q", tenant, got, err, want)
		}
	}
	for _, bad := range []string{"", ".", "..", "a/../b", "a//b", "/a", "a/", "a.b", "sb.k3jx", "a b", "a\x00", strings.Repeat("a", 129), strings.Repeat("a/", 16) + "a"} {
		if got, err := leafDir(bad, "k3jx"); err == nil {
			t.Errorf("leafDir(%q) = %q, want an error", bad, got)
		}
		if got, err := leafDir("acme", bad); err == nil {
			t.Errorf("leafDir(acme, %q) = %q, want an error", bad, got)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("LeafPath took a path that leads out of the tree")
		}
	}()
	(&Tree{slicePath: "/x.slice"}).LeafPath("acme/../..", "a")
}

// FuzzNames: no two tenants share a directory, none is a leaf or a control
// file, and every directory says whose it is.
func FuzzNames(f *testing.F) {
	f.Add("tasks", "_tasks")
	f.Add("a/b", "a")
	f.Fuzz(func(t *testing.T, a, b string) {
		da, err := tenantDir(a)
		if err != nil {
			return
		}
		for s := range strings.SplitSeq(da, "/") {
			if strings.Contains(s, ".") || reserved[s] || s == "" {
				t.Errorf("tenant %q has directory %q", a, s)
			}
		}
		if got, ok := decodeTenant(da); !ok || got != a {
			t.Errorf("directory %q of %q reads as %q, %t", da, a, got, ok)
		}
		if db, err := tenantDir(b); err == nil && (da == db) != (a == b) {
			t.Errorf("tenants %q and %q have directories %q and %q", a, b, da, db)
		}
	})
}

func TestParseKeys(t *testing.T) {
	for text, want := range map[string]map[string]uint64{
		"":                                  {},
		"usage_usec 1234\nuser_usec 1000\n": {"usage_usec": 1234, "user_usec": 1000},
		"populated 1\nfrozen 0":             {"populated": 1, "frozen": 0},
		"low 0\nhigh 0\nmax 2\noom 1\noom_kill 18446744073709551615": {"low": 0, "high": 0, "max": 2, "oom": 1, "oom_kill": 1<<64 - 1},
	} {
		got, err := parseKeys(text)
		if err != nil {
			t.Errorf("parseKeys(%q): %v", text, err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("parseKeys(%q) (-want +got):\n%s", text, d)
		}
	}
	for _, bad := range []string{"usage_usec", "usage_usec ", "usage_usec x", "usage_usec -1", "usage_usec 18446744073709551616", " 1", "a 1\n\nb 2", "a 1\na 2"} {
		if got, err := parseKeys(bad); err == nil {
			t.Errorf("parseKeys(%q) = %v, want an error", bad, got)
		}
	}
}

// FuzzKeys: cpu.stat, memory.stat, memory.events, cgroup.events. What is
// read can be written and read again; nothing is invented.
func FuzzKeys(f *testing.F) {
	f.Add("usage_usec 1234\nuser_usec 1000\nsystem_usec 234\nnr_periods 0\nnr_throttled 0\nthrottled_usec 0\n")
	f.Add("anon 0\nfile 4096\nkernel_stack 16384\n")
	f.Add("low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n")
	f.Add("populated 1\nfrozen 0\n")
	f.Fuzz(func(t *testing.T, text string) {
		keys, err := parseKeys(text)
		if err != nil {
			return
		}
		var b strings.Builder
		for _, k := range slices.Sorted(maps.Keys(keys)) {
			if !strings.Contains(text, k+" ") {
				t.Errorf("key %q is not in %q", k, text)
			}
			fmt.Fprintf(&b, "%s %d\n", k, keys[k])
		}
		again, err := parseKeys(b.String())
		if err != nil || !maps.Equal(keys, again) {
			t.Errorf("%q reads as %v, again as %v, %v", text, keys, again, err)
		}
	})
}

func TestParsePIDs(t *testing.T) {
	got, err := parsePIDs("1\n0\n4194304")
	if err != nil || !slices.Equal(got, []int{1, 4194304}) {
		t.Errorf("parsePIDs = %v, %v", got, err)
	}
	for _, bad := range []string{"x", "-1", "1 2", "\n"} {
		if got, err := parsePIDs(bad); err == nil {
			t.Errorf("parsePIDs(%q) = %v, want an error", bad, got)
		}
	}
}

func TestParsePressure(t *testing.T) {
	got, err := parsePressure("some avg10=1.50 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=5\n")
	want := Stall{SomeUsec: 77, FullUsec: 5, SomeAvg10: 1.5, FullAvg10: 0.25}
	if err != nil || got != want {
		t.Errorf("parsePressure = %+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"", "full avg10=0 total=1", "some", "some avg10=0", "some total=1", "some avg10=x total=1", "some avg10=NaN total=1", "some avg10=1 total=-1"} {
		if got, err := parsePressure(bad); err == nil {
			t.Errorf("parsePressure(%q) = %+v, want an error", bad, got)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
	f.Add("1\n2\n3\n")
	f.Add("34 25 0:29 / /sys/fs/cgroup\\040x rw - cgroup2 cgroup2 rw,nsdelegate\n")
	f.Fuzz(func(t *testing.T, text string) {
		if s, err := parsePressure(text); err == nil && !(s.SomeAvg10 >= 0 && s.FullAvg10 >= 0) {
			t.Errorf("parsePressure(%q) = %+v", text, s)
		}
		if pids, err := parsePIDs(text); err == nil {
			for _, p := range pids {
				if p <= 0 {
					t.Errorf("parsePIDs(%q) holds %d", text, p)
				}
			}
		}
		for _, m := range parseMounts(text) {
			if m.fstype == "" {
				t.Errorf("parseMounts(%q) made up a mount", text)
			}
		}
	})
}

const hybridMounts = `25 30 0:23 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
26 25 0:24 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
27 25 0:25 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
28 25 0:26 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
29 25 0:27 / /sys/fs/cgroup/unified rw shared:9 master:3 - cgroup2 cgroup2 rw
31 30 0:28 / /mnt/my\040disk rw - ext4 /dev/vda rw
`

const unifiedMounts = `25 30 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate
30 1 0:1 / / rw - ext4 /dev/vda rw
`

func TestLocate(t *testing.T) {
	v1 := func(sub string) map[string]string {
		return map[string]string{
			"cpu": "/sys/fs/cgroup/cpu,cpuacct" + sub, "cpuacct": "/sys/fs/cgroup/cpu,cpuacct" + sub,
			"memory": "/sys/fs/cgroup/memory" + sub, "xattr": "/sys/fs/cgroup/systemd" + sub, "name=systemd": "/sys/fs/cgroup/systemd" + sub,
		}
	}
	for _, c := range []struct {
		mounts, root string
		want         hosts
	}{
		{unifiedMounts, "", hosts{"/sys/fs/cgroup", ".", map[string]string{}}},
		{unifiedMounts, "/sys/fs/cgroup/a/b/", hosts{"/sys/fs/cgroup/a/b", "a/b", map[string]string{}}},
		{hybridMounts, "", hosts{"/sys/fs/cgroup/unified", ".", v1("")}},
		{hybridMounts, "/sys/fs/cgroup", hosts{"/sys/fs/cgroup/unified", ".", v1("")}},
		{hybridMounts, "/sys/fs/cgroup/unified/a", hosts{"/sys/fs/cgroup/unified/a", "a", v1("/a")}},
	} {
		got, err := locate(parseMounts(c.mounts), c.root)
		if err != nil {
			t.Errorf("locate(%q): %v", c.root, err)
		}
		if d := cmp.Diff(c.want, got, cmp.AllowUnexported(hosts{})); d != "" {
			t.Errorf("locate(%q) (-want +got):\n%s", c.root, d)
		}
	}
	for want, c := range map[string]struct{ mounts, root string }{
		"no cgroup v2 is mounted": {"", ""},
		"not an absolute path":    {unifiedMounts, "a"},
		"is not on cgroup v2":     {hybridMounts, "/sys/fs/cgroup/memory/a"},
	} {
		if got, err := locate(parseMounts(c.mounts), c.root); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("locate(%q) = %+v, %v, want %q", c.root, got, err, want)
		}
	}
	if got, want := unescape(`/mnt/my\040disk\`), `/mnt/my disk\`; got != want {
		t.Errorf("unescape = %q, want %q", got, want)
	}
}
