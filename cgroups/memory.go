// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// setMemory limits a tenant's memory and, on cgroup v2, forbids it to swap.
//
// memory.oom.group is not set here: a tenant that runs out of memory loses
// one sandbox, not all. The runtime sets it on the leaf, so that the whole
// sandbox goes.
func (t *Tree) setMemory(dir string, bytes int64) error {
	if t.onV2("memory") {
		node := filepath.Join(t.v2, dir)
		err := writeFile(filepath.Join(node, "memory.swap.max"), "0")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return writeFile(filepath.Join(node, "memory.max"), maxOr(bytes))
	}
	root, ok := t.onV1("memory")
	if !ok {
		return nil
	}
	return setMemoryV1(filepath.Join(root, dir), bytes)
}

// maxOr is a limit in the words of cgroup v2.
func maxOr(n int64) string {
	if n == 0 {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}

// setMemoryV1 limits memory, and memory and swap together, to the same. The
// second may never be below the first, so the order depends on the direction.
func setMemoryV1(node string, bytes int64) error {
	value := "-1"
	if bytes != 0 {
		value = strconv.FormatInt(bytes, 10)
	}
	limit, both := filepath.Join(node, "memory.limit_in_bytes"), filepath.Join(node, "memory.memsw.limit_in_bytes")
	err := writeFile(limit, value)
	raising := errors.Is(err, unix.EINVAL)
	if err != nil && !raising {
		return err
	}
	err = writeFile(both, value)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if raising {
		return writeFile(limit, value)
	}
	return nil
}

// useHierarchy makes a node's limit hold for what is below it. Linux 5.11 and
// later always do.
func useHierarchy(node string) error {
	file := filepath.Join(node, "memory.use_hierarchy")
	on, err := readInt(file)
	if errors.Is(err, fs.ErrNotExist) || err == nil && on != 0 {
		return nil
	}
	if err != nil {
		return err
	}
	return writeFile(file, "1")
}

type memoryStat struct{ current, peak, oomKills *uint64 }

func (t *Tree) memoryStat(dir string) (memoryStat, error) {
	node, current, peak, events := filepath.Join(t.v2, dir), "memory.current", "memory.peak", "memory.events"
	if !t.onV2("memory") {
		root, ok := t.onV1("memory")
		if !ok {
			return memoryStat{}, nil
		}
		node = filepath.Join(root, dir)
		current, peak, events = "memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"
	}
	var s memoryStat
	var err error
	if s.current, err = optional(node, current); err != nil {
		return s, err
	}
	if s.peak, err = optional(node, peak); err != nil { // v2: Linux 5.19
		return s, err
	}
	keys, err := readKeys(filepath.Join(node, events))
	if err != nil {
		return s, err
	}
	if v, ok := keys["oom_kill"]; ok { // v1: Linux 4.13
		s.oomKills = &v
	}
	return s, nil
}

func memoryShortcoming(t *Tree) string {
	if t.onV2("memory") {
		return ""
	}
	if _, ok := t.onV1("memory"); !ok {
		return "memory: no controller; no memory limit holds"
	}
	return "memory: on cgroup v1 a sandbox out of memory may lose one process instead of ending, and a tenant's limit cannot be set below what it uses"
}

// swapShortcoming matters only where there is swap.
func swapShortcoming(t *Tree) string {
	swaps, err := os.ReadFile("/proc/swaps")
	if err == nil && strings.Count(string(swaps), "\n") < 2 { // a heading alone
		return ""
	}
	if t.onV2("memory") {
		if _, err := os.Stat(filepath.Join(t.v2, "memory.swap.max")); err != nil {
			return "swap: the kernel does not account for it (boot with swapaccount=1); sandboxes may be swapped without limit"
		}
		return ""
	}
	root, ok := t.onV1("memory")
	if !ok {
		return "swap: no controller; sandboxes may be swapped without limit"
	}
	if _, err := os.Stat(filepath.Join(root, "memory.memsw.limit_in_bytes")); err != nil {
		return "swap: the kernel does not account for it (boot with swapaccount=1); sandboxes may be swapped without limit"
	}
	return "swap: cgroup v1 limits memory and swap together; sandboxes may be swapped within their memory limit"
}

// optional reads a number, nil if the cgroup is there but the file is not.
func optional(node, file string) (*uint64, error) {
	v, err := readUint(filepath.Join(node, file))
	if err == nil {
		return &v, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Stat(node); serr == nil {
			return nil, nil
		}
	}
	return nil, fmt.Errorf("read %s: %w", file, err)
}
