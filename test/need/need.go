// SPDX-License-Identifier: Apache-2.0

// Package need says what a test cannot do without. On a laptop a test that
// lacks something is skipped; under CI=true it fails, so that a green run
// means that everything ran.
package need

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// missing skips, or fails under CI.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("needs %s (CI=true: a skip is a failure)", what)
	}
	t.Skipf("needs %s", what)
}

// Root needs effective uid 0.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "root")
	}
}

// Netns needs root and permission to make network namespaces.
func Netns(t testing.TB) {
	t.Helper()
	Root(t)
	if _, err := os.Stat("/proc/self/ns/net"); err != nil {
		missing(t, "network namespaces")
	}
}

// BPF needs root and a kernel of 6.6 or later with BTF (TCX).
func BPF(t testing.TB) {
	t.Helper()
	Root(t)
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		missing(t, "a kernel with BTF")
	}
}

// Program needs an executable on PATH and answers its path.
func Program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, name+" on PATH (make setup installs it)")
	}
	return path
}

// CgroupV2 needs the unified hierarchy to be all there is and answers its root.
func CgroupV2(t testing.TB) string {
	t.Helper()
	Root(t)
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		t.Skip("needs unified cgroup v2; the vm tier runs this test")
	}
	return "/sys/fs/cgroup"
}
