// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Kill sends SIGKILL to every process of a sandbox, frozen or not; nil if
// there is no leaf. It does not wait for them to end.
//
// On cgroup v2 (Linux 5.14) the kernel does it at one stroke, and a process
// that forks meanwhile is not missed. Processes that are in the sandbox's v1
// cgroups alone, and all on older kernels, are killed one by one until a pass
// finds no new one.
func (t *Tree) Kill(tenant, id string) error {
	dirs, err := t.leafDirs(tenant, id)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		whole, err := t.killWhole(dir)
		if err == nil && !whole {
			err = killEach(dir)
		}
		if err != nil {
			return fmt.Errorf("kill processes of %s: %w", id, err)
		}
	}
	if err := t.thawV1(tenant, id); err != nil { // a process that v1 froze does not die
		return fmt.Errorf("kill processes of %s: %w", id, err)
	}
	return nil
}

// killWhole kills a v2 cgroup; false if this must be done one by one.
func (t *Tree) killWhole(dir string) (bool, error) {
	if !below(dir, t.v2) {
		return false, nil
	}
	err := writeFile(filepath.Join(dir, "cgroup.kill"), "1")
	if errors.Is(err, fs.ErrNotExist) {
		_, serr := os.Stat(dir)
		return errors.Is(serr, fs.ErrNotExist), nil // the leaf has gone, or the kernel is old
	}
	return err == nil, err
}

// killPasses bounds the passes over a cgroup whose processes fork as fast as
// they are killed; its pids limit ends that long before.
const killPasses = 1000

func killEach(dir string) error {
	seen := map[int]bool{}
	for range killPasses {
		pids, err := procsBelow(dir)
		if err != nil {
			return err
		}
		pids = slices.DeleteFunc(pids, func(p int) bool { return seen[p] })
		if len(pids) == 0 {
			return nil
		}
		for batch := range slices.Chunk(pids, 256) { // each holds a descriptor
			if err := killBatch(dir, batch); err != nil {
				return err
			}
		}
		for _, p := range pids {
			seen[p] = true
		}
	}
	return fmt.Errorf("%s: processes fork faster than they are killed", dir)
}

// killBatch holds on to each process, looks again that it is in the cgroup,
// and only then kills it: a number alone may have been given to another.
func killBatch(dir string, pids []int) error {
	held := map[int]int{}
	defer func() {
		for _, fd := range held {
			_ = unix.Close(fd)
		}
	}()
	for _, p := range pids {
		fd, err := unix.PidfdOpen(p, 0)
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
			continue // gone, or only a thread's number is left
		}
		if err != nil {
			return fmt.Errorf("hold process %d: %w", p, err)
		}
		held[p] = fd
	}
	still, err := procsBelow(dir)
	if err != nil {
		return err
	}
	for _, p := range still {
		fd, ok := held[p]
		if !ok {
			continue
		}
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill process %d: %w", p, err)
		}
	}
	return nil
}

func killShortcoming(t *Tree) string {
	// The root has no cgroup.kill; the slice shows whether the kernel has it.
	if _, err := os.Stat(filepath.Join(t.v2, "cgroup.kill")); err == nil {
		return ""
	}
	return "kill: the kernel (before 5.14) cannot kill a cgroup at one stroke; processes are killed one by one"
}
