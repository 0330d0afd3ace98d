// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// freezeWait bounds how long a process may stay in the kernel before it
// counts as one that cannot be stopped.
const freezeWait = 2 * time.Second

// Freeze stops every process of a sandbox and returns when all stand still.
// If one does not, Freeze lets them all go on and answers an error. The error
// wraps fs.ErrNotExist if there is no leaf.
func (t *Tree) Freeze(tenant, id string) error {
	dir, err := leafDir(tenant, id)
	if err != nil {
		return err
	}
	freeze, frozen, err := t.freezer(dir)
	if err != nil {
		return fmt.Errorf("freeze %s: %w", id, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), freezeWait)
	defer cancel()
	err = poll(ctx, func() (bool, error) {
		if err := freeze(); err != nil { // again and again: v1 forgets it when a process forks
			return false, err
		}
		return frozen()
	})
	if err != nil {
		return errors.Join(fmt.Errorf("freeze %s: %w", id, err), t.Thaw(tenant, id))
	}
	return nil
}

// freezer answers how to freeze a leaf. On a hybrid host a runtime may have
// left the v2 leaf out; an empty cgroup says that it is frozen.
func (t *Tree) freezer(dir string) (freeze func() error, frozen func() (bool, error), err error) {
	v2 := filepath.Join(t.v2, dir)
	events, err := readKeys(filepath.Join(v2, "cgroup.events"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	root, hasV1 := t.v1["freezer"]
	v1 := filepath.Join(root, dir, "freezer.state")
	if hasV1 && events["populated"] == 0 {
		if _, verr := os.Stat(v1); verr == nil {
			return func() error { return writeFile(v1, "FROZEN") },
				func() (bool, error) { s, err := readText(v1); return s == "FROZEN", err }, nil
		}
	}
	if err != nil {
		return nil, nil, err
	}
	return func() error { return writeFile(filepath.Join(v2, "cgroup.freeze"), "1") },
		func() (bool, error) { return frozenV2(v2) }, nil
}

func frozenV2(dir string) (bool, error) {
	events, err := readKeys(filepath.Join(dir, "cgroup.events"))
	return events["frozen"] == 1, err
}

// Thaw lets the processes of a sandbox go on; nil if there is no leaf.
func (t *Tree) Thaw(tenant, id string) error {
	dir, err := leafDir(tenant, id)
	if err != nil {
		return err
	}
	err = writeFile(filepath.Join(t.v2, dir, "cgroup.freeze"), "0")
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err = errors.Join(err, t.thawV1(tenant, id)); err != nil {
		return fmt.Errorf("thaw %s: %w", id, err)
	}
	return nil
}

func (t *Tree) thawV1(tenant, id string) error {
	dir, err := leafDir(tenant, id)
	root, ok := t.v1["freezer"]
	if err != nil || !ok {
		return err
	}
	err = writeFile(filepath.Join(root, dir, "freezer.state"), "THAWED")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Frozen reports whether a sandbox is stopped, by Freeze or by the runtime.
func (t *Tree) Frozen(tenant, id string) (bool, error) {
	dir, err := leafDir(tenant, id)
	if err != nil {
		return false, err
	}
	if root, ok := t.v1["freezer"]; ok {
		state, err := readText(filepath.Join(root, dir, "freezer.state"))
		if err == nil && strings.HasPrefix(state, "FR") { // FREEZING counts
			return true, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("read freezer of %s: %w", id, err)
		}
	}
	want, err := readUint(filepath.Join(t.v2, dir, "cgroup.freeze"))
	if err != nil {
		return false, fmt.Errorf("read freezer of %s: %w", id, err)
	}
	return want == 1, nil
}
