// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Ensure makes a tenant's node, with its parents, and writes its limits; it
// leaves the limits of the parents alone. A new parent has none: call Ensure
// for the ancestors too.
//
// A memory limit below what is in use makes the kernel reclaim and, on cgroup
// v2, kill; on v1 it is refused.
func (t *Tree) Ensure(path string, l Limits) error {
	dir, err := tenantDir(path)
	if err != nil {
		return err
	}
	if err := l.check(); err != nil {
		return fmt.Errorf("limits of %s: %w", path, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.makeNodes(dir); err != nil {
		return fmt.Errorf("make cgroup of %s: %w", path, err)
	}
	if err := errors.Join(t.setCPU(dir, l.CPUMillis), t.setMemory(dir, l.MemoryBytes), t.setPIDs(dir, l.PIDs)); err != nil {
		return fmt.Errorf("limit %s: %w", path, err)
	}
	return nil
}

func (l Limits) check() error {
	switch {
	case l.CPUMillis < 0 || l.MemoryBytes < 0 || l.PIDs < 0:
		return fmt.Errorf("negative limit in %+v", l)
	case l.CPUMillis != 0 && l.CPUMillis < minCPUMillis:
		return fmt.Errorf("%d CPU millis: the kernel takes %d or more", l.CPUMillis, minCPUMillis)
	case l.CPUMillis > maxCPUMillis:
		return fmt.Errorf("%d CPU millis: want %d at most", l.CPUMillis, maxCPUMillis)
	}
	return nil
}

// makeNodes makes every node of the path and enables the controllers below
// each: the runtime makes leaves in any of them.
func (t *Tree) makeNodes(dir string) error {
	segments := strings.Split(dir, "/")
	for _, root := range t.ownHierarchies() {
		node := root
		for _, s := range segments {
			node = filepath.Join(node, s)
			if err := makeDir(node); err != nil {
				return err
			}
			if root != t.v2 {
				continue
			}
			if err := t.enable(node); err != nil {
				return err
			}
		}
	}
	return nil
}

func makeDir(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// enable hands the controllers of a v2 cgroup on to its children.
func (t *Tree) enable(dir string) error {
	file := filepath.Join(dir, "cgroup.subtree_control")
	have, err := readWords(file)
	if err != nil {
		return err
	}
	var want []string
	for _, c := range t.controllers {
		if !slices.Contains(have, c) {
			want = append(want, "+"+c)
		}
	}
	if len(want) == 0 {
		return nil
	}
	err = writeFile(file, strings.Join(want, " "))
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: processes live in %s; move them to a child of it (systemd: Delegate=yes and DelegateSubgroup=)", err, dir)
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: %s has not all of them; delegate them to it (systemd: Delegate=cpu io memory pids)", err, dir)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: %s is threaded", err, dir)
	}
	return err
}

// Prune removes a tenant's node. It is nil if there is none, and ErrNotEmpty
// if sandboxes, tenants below it or processes are in it. A sandbox that the
// runtime starts there later would have no tenant limits: Ensure first.
func (t *Tree) Prune(path string) error {
	dir, err := tenantDir(path)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.prune(dir)
}

func (t *Tree) prune(dir string) error {
	for _, root := range t.hierarchies { // look before the first is gone
		node := filepath.Join(root, dir)
		children, err := childDirs(node)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if len(children) > 0 {
			return fmt.Errorf("remove %s: %w: it holds %s", node, ErrNotEmpty, children[0])
		}
	}
	for _, root := range t.hierarchies {
		node := filepath.Join(root, dir)
		err := unix.Rmdir(node)
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
		case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOTEMPTY):
			return fmt.Errorf("remove %s: %w", node, ErrNotEmpty)
		default:
			return fmt.Errorf("remove %s: %w", node, err)
		}
	}
	return nil
}

// Purge removes every node and the slice: for a host that gives the product
// up. ErrNotEmpty if a sandbox is left.
func (t *Tree) Purge() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	nodes := map[string]bool{"": true}
	err := t.walk(func(dir, name string) bool {
		nodes[filepath.Join(dir, name)] = true
		return !strings.HasPrefix(name, leafPrefix)
	})
	if err != nil {
		return err
	}
	sorted := slices.Sorted(maps.Keys(nodes))
	for _, dir := range slices.Backward(sorted) { // children sort after their parents
		if strings.HasPrefix(filepath.Base(dir), leafPrefix) {
			return fmt.Errorf("remove %s: %w", dir, ErrNotEmpty)
		}
		if err := t.prune(dir); err != nil {
			return err
		}
	}
	return nil
}

// List answers, sorted, every leaf that some hierarchy has.
func (t *Tree) List() ([]Leaf, error) {
	found := map[Leaf]bool{}
	err := t.walk(func(dir, name string) bool {
		id, isLeaf := strings.CutPrefix(name, leafPrefix)
		if !isLeaf {
			_, isTenant := decodeSegment(name)
			return isTenant
		}
		if tenant, ok := decodeTenant(dir); ok && checkName(id, false) == nil {
			found[Leaf{tenant, id}] = true
		}
		return false
	})
	if err != nil {
		return nil, err
	}
	return slices.SortedFunc(maps.Keys(found), func(a, b Leaf) int {
		if c := strings.Compare(a.Tenant, b.Tenant); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	}), nil
}

func decodeTenant(dir string) (string, bool) {
	if dir == "" {
		return "", false
	}
	segments := strings.Split(dir, "/")
	for i, s := range segments {
		d, ok := decodeSegment(s)
		if !ok {
			return "", false
		}
		segments[i] = d
	}
	return strings.Join(segments, "/"), true
}

// walk calls f for every directory below the slice, of every hierarchy, with
// its parent's path below the slice; f says whether to go into it. What
// vanishes meanwhile is passed over.
func (t *Tree) walk(f func(dir, name string) bool) error {
	var visit func(root, dir string) error
	visit = func(root, dir string) error {
		children, err := childDirs(filepath.Join(root, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, c := range children {
			if f(dir, c) {
				if err := visit(root, filepath.Join(dir, c)); err != nil {
					return err
				}
			}
		}
		return nil
	}
	for _, root := range t.hierarchies {
		if err := visit(root, ""); err != nil {
			return fmt.Errorf("list cgroups: %w", err)
		}
	}
	return nil
}

// childDirs answers the names of the child cgroups.
func childDirs(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	if errors.Is(err, unix.ENODEV) { // removed while it was read
		err = fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return names, err
}
