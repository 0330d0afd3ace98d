// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

const defaultRoot = "/sys/fs/cgroup"

// mount is one line of mountinfo.
type mount struct {
	point, fstype string
	options       []string // of the file system
}

// parseMounts reads /proc/self/mountinfo, see proc_pid_mountinfo(5). Lines
// that it cannot read are left out.
func parseMounts(text string) []mount {
	var all []mount
	for line := range strings.Lines(text) {
		before, after, ok := strings.Cut(strings.TrimSpace(line), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 6 || len(right) < 3 {
			continue
		}
		all = append(all, mount{point: unescape(left[4]), fstype: right[0], options: strings.Split(right[2], ",")})
	}
	return all
}

// unescape undoes the octal escapes of mountinfo (space, tab, newline,
// backslash).
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// hosts are the directories below which the slice is made.
type hosts struct {
	root string            // on cgroup v2
	path string            // of root, below its mount
	v1   map[string]string // controller or "name=x" -> directory
}

// locate finds the hierarchies for a wanted root, "" for the default.
func locate(mounts []mount, root string) (hosts, error) {
	if root == "" {
		root = defaultRoot
	}
	root = filepath.Clean(root)
	if !filepath.IsAbs(root) {
		return hosts{}, fmt.Errorf("root %q is not an absolute path", root)
	}
	var v2, v2Below string
	var last mount // the mount that root is on: the longest path, the newest of equals
	v1 := map[string]string{}
	for _, m := range mounts {
		if below(root, m.point) && len(m.point) >= len(last.point) {
			last = m
		}
		switch m.fstype {
		case "cgroup2":
			if below(m.point, root) && v2Below == "" {
				v2Below = m.point
			}
			if v2 == "" {
				v2 = m.point
			}
		case "cgroup":
			for _, o := range m.options {
				if o != "rw" && o != "ro" && v1[o] == "" {
					v1[o] = m.point
				}
			}
		}
	}
	h := hosts{root: root, v1: map[string]string{}}
	switch {
	case last.fstype == "cgroup2":
		rel, err := filepath.Rel(last.point, root)
		if err != nil {
			return h, err
		}
		h.path = rel
	case v2Below != "": // root is where hierarchies are mounted
		h.root, h.path = v2Below, "."
	case v2 == "":
		return h, errors.New("no cgroup v2 is mounted; boot with systemd.unified_cgroup_hierarchy=1")
	default:
		return h, fmt.Errorf("root %s is not on cgroup v2, which is mounted at %s", root, v2)
	}
	for c, point := range v1 {
		h.v1[c] = filepath.Join(point, h.path)
	}
	return h, nil
}

// below reports whether path is dir or lies below it.
func below(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}
