// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dirPrefix of every rig's directory.
const dirPrefix = "bh-rig-"

// Leftovers names everything of a rig that is on the machine, for tests that
// assert that nothing is. Directories do not count while a rig is open.
func Leftovers() ([]string, error) {
	var found []string
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if name := l.Attrs().Name; isOurs(name) {
			found = append(found, "link "+name)
		}
	}
	tables, err := (&nftables.Conn{}).ListTables()
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		if t.Name == NFTable {
			found = append(found, "nft table "+t.Name)
		}
	}
	cgroups, err := filepath.Glob("/sys/fs/cgroup/*/" + Slice)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat("/sys/fs/cgroup/" + Slice); err == nil {
		cgroups = append(cgroups, "/sys/fs/cgroup/"+Slice)
	}
	for _, c := range cgroups {
		found = append(found, "cgroup "+c)
	}
	mounts, err := mountsBelow(filepath.Join(os.TempDir(), dirPrefix))
	for _, m := range mounts {
		found = append(found, "mount "+m)
	}
	return found, err
}

func isOurs(link string) bool {
	return strings.HasPrefix(link, "inet-bt-") || strings.HasPrefix(link, LinkPrefix) && len(link) == len(LinkPrefix)+12
}

// sweep removes whatever a rig has left. The caller holds the lock, so no
// other rig runs.
func sweep() error {
	var errs []error
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*"))
	errs = append(errs, err)
	for _, dir := range dirs {
		killUsers(dir)
	}
	links, err := netlink.LinkList()
	errs = append(errs, err)
	for _, l := range links {
		if isOurs(l.Attrs().Name) {
			if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
				errs = append(errs, fmt.Errorf("remove link %s: %w", l.Attrs().Name, err))
			}
		}
	}
	conn := &nftables.Conn{}
	if tables, err := conn.ListTables(); err == nil {
		for _, t := range tables {
			if t.Name == NFTable {
				conn.DelTable(t)
			}
		}
		errs = append(errs, conn.Flush())
	}
	for _, dir := range dirs {
		mounts, err := mountsBelow(dir)
		errs = append(errs, err)
		for i := len(mounts) - 1; i >= 0; i-- {
			if err := unix.Unmount(mounts[i], unix.MNT_DETACH); err != nil {
				errs = append(errs, fmt.Errorf("unmount %s: %w", mounts[i], err))
			}
		}
		errs = append(errs, os.RemoveAll(dir))
	}
	roots, err := filepath.Glob("/sys/fs/cgroup/*/" + Slice)
	errs = append(errs, err)
	for _, root := range append(roots, "/sys/fs/cgroup/"+Slice) {
		errs = append(errs, removeCgroup(root))
	}
	return errors.Join(errs...)
}

// killUsers ends daemons of an earlier run that were started with a
// configuration in dir.
func killUsers(dir string) {
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		cmdline, err := os.ReadFile(p)
		if err != nil || !strings.Contains(string(cmdline), dir+"/") || !strings.Contains(string(cmdline), "bulkhead-") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p))); err == nil && pid != os.Getpid() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// mountsBelow lists mount points whose path begins with prefix.
func mountsBelow(prefix string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], prefix) {
			out = append(out, f[4])
		}
	}
	return out, nil
}

// removeCgroup kills what is in a cgroup of ours and removes it, children
// first.
func removeCgroup(root string) error {
	var dirs []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := removeOne(dirs[i]); err != nil {
			return err
		}
	}
	return nil
}

func removeOne(dir string) error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if time.Now().After(deadline) {
			return err
		}
		pids, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		for _, f := range strings.Fields(string(pids)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
}
