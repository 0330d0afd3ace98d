// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

const (
	leafPrefix = "sb."
	maxName    = 128 // far below NAME_MAX, which an escaped name must not pass
	maxDepth   = 16
)

// Leaf names a sandbox's cgroup.
type Leaf struct{ Tenant, ID string }

// checkName accepts what may be a directory: letters, digits, - and _, and
// dots inside if allowed.
func checkName(s string, dots bool) error {
	if s == "" || len(s) > maxName {
		return fmt.Errorf("name %q: want 1 to %d characters", s, maxName)
	}
	for i, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		case c == '.' && dots && i > 0:
		default:
			return fmt.Errorf("name %q: %q is not allowed", s, string(rune(c)))
		}
	}
	return nil
}

// reserved are the control files of cgroup v1 whose names hold no dot.
var reserved = map[string]bool{"tasks": true, "notify_on_release": true, "release_agent": true}

func encodeSegment(s string) string {
	if reserved[s] || s[0] == '_' {
		return "_" + s
	}
	return s
}

// decodeSegment is the opposite; false for a directory that is no tenant's.
func decodeSegment(dir string) (string, bool) {
	s := strings.TrimPrefix(dir, "_")
	if checkName(s, false) != nil || encodeSegment(s) != dir {
		return "", false
	}
	return s, true
}

// tenantDir answers a tenant's path below the slice.
func tenantDir(tenant string) (string, error) {
	if tenant == "" {
		return "", errors.New("tenant path is empty")
	}
	segments := strings.Split(tenant, "/")
	if len(segments) > maxDepth {
		return "", fmt.Errorf("tenant path %q is deeper than %d", tenant, maxDepth)
	}
	for i, s := range segments {
		if err := checkName(s, false); err != nil {
			return "", fmt.Errorf("tenant path %q: %w", tenant, err)
		}
		segments[i] = encodeSegment(s)
	}
	return filepath.Join(segments...), nil
}

// leafDir answers a sandbox's path below the slice.
func leafDir(tenant, id string) (string, error) {
	dir, err := tenantDir(tenant)
	if err != nil {
		return "", err
	}
	if err := checkName(id, false); err != nil {
		return "", fmt.Errorf("sandbox id: %w", err)
	}
	return filepath.Join(dir, leafPrefix+id), nil
}

// LeafPath is the cgroupsPath of a sandbox's OCI spec, for the cgroupfs
// driver: absolute, below the mount of each hierarchy.
//
// Preconditions: Ensure has accepted the tenant; id is letters, digits, - and
// _. It panics otherwise, because a runtime that is given no path or another
// one starts the sandbox outside its tenant.
func (t *Tree) LeafPath(tenant, id string) string {
	dir, err := leafDir(tenant, id)
	if err != nil {
		panic("cgroups: LeafPath: " + err.Error())
	}
	return filepath.Join(t.slicePath, dir)
}
