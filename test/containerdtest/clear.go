// SPDX-License-Identifier: Apache-2.0

package containerdtest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Files of an instance's directory that say who it is.
const (
	lockName   = "lock"
	cgroupName = "cgroup"
)

// sweep clears the directories of instances that died without closing. Errors
// are left to the next sweep: they are not this test's.
func sweep() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*"))
	for _, dir := range dirs {
		lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR, 0)
		if err != nil {
			continue // being made, or being removed
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			if parent, err := os.ReadFile(filepath.Join(dir, cgroupName)); err == nil {
				_ = clear(dir, string(parent))
			}
		}
		lock.Close()
	}
}

// clear kills what belongs to dir, unmounts, and removes cgroups and files.
func clear(dir, cgroupParent string) error {
	var errs []error
	// A shim that still starts may fork meanwhile: repeat until none is left.
	deadline := time.Now().Add(stopLimit)
	for {
		pids := owned(dir)
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if len(pids) == 0 {
			break
		}
		if time.Now().After(deadline) {
			errs = append(errs, fmt.Errorf("processes do not end: %v", pids))
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, m := range slices.Backward(mountsBelow(dir)) {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m, err))
		}
	}
	for _, c := range cgroupDirs(cgroupParent) {
		errs = append(errs, removeCgroup(c, deadline))
	}
	errs = append(errs, os.RemoveAll(dir))
	return errors.Join(errs...)
}

// owned answers the processes of an instance: its daemon and shims, whatever
// descends from the shims, and the first processes of containers whose shim is
// gone, as runc's state names them.
func owned(dir string) []int {
	parent := map[int]int{}
	var mine []int
	for _, pid := range allPids() {
		st, ok := readStat(pid)
		if !ok || st.state == 'Z' {
			continue
		}
		parent[pid] = st.ppid
		if pid != os.Getpid() && namesDir(pid, dir) {
			mine = append(mine, pid)
		}
	}
	states, _ := filepath.Glob(filepath.Join(dir, "runc", "*", "*", "state.json"))
	for _, path := range states {
		var s struct {
			Pid   int    `json:"init_process_pid"`
			Start uint64 `json:"init_process_start"`
		}
		b, err := os.ReadFile(path)
		if err != nil || json.Unmarshal(b, &s) != nil {
			continue
		}
		if st, ok := readStat(s.Pid); ok && st.state != 'Z' && st.start == s.Start {
			mine = append(mine, s.Pid)
		}
	}
	for again := true; again; {
		again = false
		for pid, ppid := range parent {
			if slices.Contains(mine, ppid) && !slices.Contains(mine, pid) {
				mine = append(mine, pid)
				again = true
			}
		}
	}
	slices.Sort(mine)
	return slices.Compact(mine)
}

// shims answers the shims of an instance, of one task if id is not empty.
func shims(dir, id string) []int {
	var out []int
	for _, pid := range allPids() {
		args := cmdline(pid)
		if len(args) == 0 || filepath.Base(args[0]) != "containerd-shim-runc-v2" || !namesDir(pid, dir) {
			continue
		}
		if i := slices.Index(args, "-id"); id == "" || i >= 0 && i+1 < len(args) && args[i+1] == id {
			if st, ok := readStat(pid); ok && st.state != 'Z' {
				out = append(out, pid)
			}
		}
	}
	return out
}

func allPids() []int {
	entries, _ := os.ReadDir("/proc")
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func cmdline(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}

// namesDir says whether the program is containerd's or runc's and one of its
// arguments is a path in dir.
func namesDir(pid int, dir string) bool {
	args := cmdline(pid)
	if len(args) == 0 {
		return false
	}
	switch filepath.Base(args[0]) {
	case "containerd", "containerd-shim-runc-v2", "runc", "bulkhead-log":
	default:
		return false
	}
	for _, a := range args[1:] {
		if a == dir || strings.HasPrefix(a, dir+"/") {
			return true
		}
	}
	return false
}

type procStat struct {
	state byte
	ppid  int
	start uint64 // clock ticks after boot
}

func readStat(pid int) (procStat, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return procStat{}, false
	}
	i := strings.LastIndexByte(string(b), ')')
	if i < 0 {
		return procStat{}, false
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 20 {
		return procStat{}, false
	}
	ppid, err1 := strconv.Atoi(f[1])
	start, err2 := strconv.ParseUint(f[19], 10, 64)
	return procStat{state: f[0][0], ppid: ppid, start: start}, err1 == nil && err2 == nil
}

// mountsBelow answers the mount points in dir, in the order they were made.
func mountsBelow(dir string) []string {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	var out []string
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if fields := strings.Fields(sc.Text()); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			out = append(out, fields[4])
		}
	}
	return out
}

// cgroupDirs answers the directories of that name in all hierarchies.
func cgroupDirs(name string) []string {
	if name == "" || strings.ContainsAny(name, "/*?[") {
		return nil
	}
	var out []string
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		dirs, _ := filepath.Glob(pattern + name)
		out = append(out, dirs...)
	}
	return out
}

// removeCgroup removes a cgroup and all below it, as soon as they are empty.
func removeCgroup(dir string, deadline time.Time) error {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for _, d := range slices.Backward(dirs) {
		for {
			err := unix.Rmdir(d)
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				return fmt.Errorf("remove cgroup %s: %w", d, err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return nil
}
