// SPDX-License-Identifier: Apache-2.0

package cgroups

import "path/filepath"

func (t *Tree) setPIDs(dir string, n int64) error {
	node, ok := t.pidsNode(dir)
	if !ok {
		return nil
	}
	return writeFile(filepath.Join(node, "pids.max"), maxOr(n))
}

// pidsNode: the files are called the same in v1 and v2.
func (t *Tree) pidsNode(dir string) (string, bool) {
	if t.onV2("pids") {
		return filepath.Join(t.v2, dir), true
	}
	root, ok := t.onV1("pids")
	return filepath.Join(root, dir), ok
}

func (t *Tree) pidsStat(dir string) (*uint64, error) {
	node, ok := t.pidsNode(dir)
	if !ok {
		return nil, nil
	}
	return optional(node, "pids.current")
}

func pidsShortcoming(t *Tree) string {
	if _, ok := t.pidsNode(""); ok {
		return ""
	}
	return "pids: no controller; the number of processes is not limited"
}
