// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Stat is one reading of a sandbox's figures. nil: this host cannot know.
type Stat struct {
	CPUUsec          uint64
	MemoryCurrent    *uint64 // bytes
	MemoryPeak       *uint64 // bytes
	OOMKills         *uint64 // processes killed for lack of memory, whoever's limit it was
	PIDs             *uint64
	CPUThrottledUsec *uint64
}

// Stat reads a sandbox's figures. The error wraps fs.ErrNotExist if its
// cgroup is not there, or goes while it is read.
func (t *Tree) Stat(tenant, id string) (Stat, error) {
	dir, err := leafDir(tenant, id)
	if err != nil {
		return Stat{}, err
	}
	var s Stat
	if s.CPUUsec, s.CPUThrottledUsec, err = t.cpuStat(dir); err != nil {
		return Stat{}, fmt.Errorf("read cpu of %s: %w", id, err)
	}
	m, err := t.memoryStat(dir)
	if err != nil {
		return Stat{}, fmt.Errorf("read memory of %s: %w", id, err)
	}
	s.MemoryCurrent, s.MemoryPeak, s.OOMKills = m.current, m.peak, m.oomKills
	if s.PIDs, err = t.pidsStat(dir); err != nil {
		return Stat{}, fmt.Errorf("read pids of %s: %w", id, err)
	}
	return s, nil
}

// leafDirs answers the leaf's directory in each hierarchy that has it.
func (t *Tree) leafDirs(tenant, id string) ([]string, error) {
	dir, err := leafDir(tenant, id)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, root := range t.hierarchies {
		leaf := filepath.Join(root, dir)
		switch _, err := os.Stat(leaf); {
		case err == nil:
			dirs = append(dirs, leaf)
		case !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
	}
	return dirs, nil
}

// Procs answers, sorted, the processes of a sandbox, in the leaf and below
// it, in any hierarchy. None, and no error, if there is no leaf.
func (t *Tree) Procs(tenant, id string) ([]int, error) {
	dirs, err := t.leafDirs(tenant, id)
	if err != nil {
		return nil, err
	}
	found := map[int]bool{}
	for _, dir := range dirs {
		pids, err := procsBelow(dir)
		if err != nil {
			return nil, fmt.Errorf("list processes of %s: %w", id, err)
		}
		for _, p := range pids {
			found[p] = true
		}
	}
	return slices.Sorted(maps.Keys(found)), nil
}

// procsBelow answers the processes of a cgroup and all below it; none if it
// is not there.
func procsBelow(dir string) ([]int, error) {
	pids, err := readPIDs(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	children, err := childDirs(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, c := range children {
		more, err := procsBelow(filepath.Join(dir, c))
		if err != nil {
			return nil, err
		}
		pids = append(pids, more...)
	}
	return pids, nil
}

// Empty reports whether a sandbox has no process; true if there is no leaf.
func (t *Tree) Empty(tenant, id string) (bool, error) {
	dirs, err := t.leafDirs(tenant, id)
	if err != nil {
		return false, err
	}
	for _, dir := range dirs {
		pids, err := procsBelow(dir)
		if err != nil {
			return false, fmt.Errorf("list processes of %s: %w", id, err)
		}
		if len(pids) > 0 {
			return false, nil
		}
	}
	return true, nil
}

// Bounds of how often a cgroup is looked at again.
const (
	firstWait = time.Millisecond
	lastWait  = 10 * time.Millisecond
)

// poll calls f until it is done, fails, or ctx ends.
func poll(ctx context.Context, f func() (bool, error)) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for wait := firstWait; ; wait = min(2*wait, lastWait) {
		done, err := f()
		if done || err != nil {
			return err
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer.C:
		}
	}
}

// WaitEmpty returns when a sandbox has no process, or with the cause of ctx.
func (t *Tree) WaitEmpty(ctx context.Context, tenant, id string) error {
	err := poll(ctx, func() (bool, error) { return t.Empty(tenant, id) })
	if err != nil {
		return fmt.Errorf("wait until %s is empty: %w", id, err)
	}
	return nil
}

// removeWait is how long Remove waits for processes that are about to end.
const removeWait = time.Second

// Remove takes away the leaf and what the sandbox made below it, in every
// hierarchy. nil if there is none; ErrNotEmpty if processes live in it.
func (t *Tree) Remove(tenant, id string) error {
	dirs, err := t.leafDirs(tenant, id)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), removeWait)
	defer cancel()
	for _, dir := range dirs {
		var last error
		err := poll(ctx, func() (bool, error) {
			last = removeBelow(dir)
			if errors.Is(last, unix.EBUSY) {
				return false, nil
			}
			return true, last
		})
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("%w (%w)", ErrNotEmpty, last)
		}
		if err != nil {
			return fmt.Errorf("remove cgroup of %s: %w", id, err)
		}
	}
	return nil
}

func removeBelow(dir string) error {
	children, err := childDirs(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, c := range children {
		if err := removeBelow(filepath.Join(dir, c)); err != nil {
			return err
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}
