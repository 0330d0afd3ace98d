// SPDX-License-Identifier: Apache-2.0

// Package cgroups keeps the tree of control groups: one node per tenant, with
// the tenant's limits, and one leaf per sandbox below it.
//
//	<root>/bulkhead.slice/acme/vision/sb.k3jx2mzq4p7a
//	       slice          tenant nodes  leaf
//
// It owns the slice and all below it, in every hierarchy. It makes tenant
// nodes and writes their limits. It never makes a leaf: the container runtime
// does that, at LeafPath, with the leaf's own limits. It never touches another
// cgroup, mounts anything or moves a process.
//
// # Names
//
// A tenant's segment is its directory; a leaf is "sb." and the sandbox id. A
// segment holds no dot, so no tenant can be called like a leaf or like a
// control file (cgroup.procs, cpu.max). The three control files of cgroup v1
// without a dot (tasks, notify_on_release, release_agent) and segments that
// begin with an underscore get an underscore in front.
//
// # Unified and hybrid
//
// On a unified host everything is cgroup v2. On a hybrid host, where some
// controllers are on cgroup v1 and the v2 tree has few or none, each
// controller is used where it is: limits and figures come from v1, while kill,
// freeze and pressure come from the v2 tree, which every sandbox is in as
// well. Open refuses such a host unless Config.AllowPartial, and NotEnforced
// says what is lost.
//
// cgroup v1 does not let a node have more CPU than its parent, v2 does. There,
// Ensure writes the parent's quota if the wanted one is larger, and lowering a
// tenant's quota lowers that of every node and leaf below it that has more;
// raising it again does not raise them. A leaf's quota must not be larger than
// its tenant's.
//
// # Figures
//
// A figure that cannot be read is an error or nil, never zero. An error wraps
// fs.ErrNotExist if the leaf is not there.
//
// # What survives
//
// Everything: the tree is the kernel's. Close leaves it. Ensure, Kill, Remove
// and Prune are idempotent.
//
// Tree.mu is the only lock; it keeps Prune from removing a node that Ensure
// has just made.
package cgroups

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// Mode says where the controllers are.
type Mode int

// Unified: all on cgroup v2. Hybrid: at least one that is needed is on v1.
const (
	Unified Mode = iota + 1
	Hybrid
)

func (m Mode) String() string {
	switch m {
	case Unified:
		return "unified"
	case Hybrid:
		return "hybrid"
	}
	return fmt.Sprintf("mode %d", int(m))
}

// Config says where the tree lives.
type Config struct {
	// Root is the cgroup below which the slice is made: a directory of the v2
	// hierarchy, such as a delegated subtree. "" is the root of the hierarchy.
	// No process may live in it unless it is the root of the hierarchy.
	Root string
	// Slice is the name of the top node; "" is "bulkhead.slice".
	Slice string
	// AllowPartial accepts a host that lacks controllers on cgroup v2.
	AllowPartial bool
}

// Limits of a tenant node, for everything below it together. 0 is no limit.
type Limits struct {
	CPUMillis   int64 // thousandths of a CPU; at least 10
	MemoryBytes int64
	PIDs        int64
}

// required are the controllers that a host must have on cgroup v2.
var required = []string{"cpu", "io", "memory", "pids"}

// ErrNotEmpty means that a cgroup holds sandboxes, other tenants or processes.
var ErrNotEmpty = errors.New("cgroup is not empty")

// Tree is the slice and all below it.
type Tree struct {
	mode        Mode
	slicePath   string            // of the slice, below the mount of every hierarchy
	v2          string            // the slice's directory on cgroup v2
	v1          map[string]string // controller -> the slice's directory on cgroup v1
	hierarchies []string          // the slice's directory in each hierarchy, v2 first
	controllers []string          // enabled on v2, of those required
	notEnforced []string

	mu sync.Mutex // held while tenant nodes are made or removed
}

// Open finds the hierarchies, makes the slice and enables the controllers on
// the way to it. If the host lacks a required controller on cgroup v2, it
// fails unless cfg.AllowPartial, and says what to do.
func Open(cfg Config) (*Tree, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	h, err := locate(parseMounts(string(text)), cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("open cgroups: %w", err)
	}
	if cfg.Slice == "" {
		cfg.Slice = "bulkhead.slice"
	}
	if err := checkName(cfg.Slice, true); err != nil {
		return nil, fmt.Errorf("open cgroups: slice: %w", err)
	}
	t, err := newTree(h, cfg)
	if err != nil {
		return nil, fmt.Errorf("open cgroups: %w", err)
	}
	if err := t.makeSlice(h.root); err != nil {
		return nil, fmt.Errorf("open cgroups: %w", err)
	}
	t.notEnforced = t.shortcomings()
	return t, nil
}

func newTree(h hosts, cfg Config) (*Tree, error) {
	have, err := readWords(filepath.Join(h.root, "cgroup.controllers"))
	if err != nil {
		return nil, err
	}
	var missing, onV1 []string
	t := &Tree{
		mode:      Unified,
		slicePath: filepath.Join("/", h.path, cfg.Slice),
		v2:        filepath.Join(h.root, cfg.Slice),
		v1:        map[string]string{},
	}
	for _, c := range required {
		switch {
		case slices.Contains(have, c):
			t.controllers = append(t.controllers, c)
		case h.v1[v1Name(c)] != "":
			onV1 = append(onV1, c)
			fallthrough
		default:
			missing = append(missing, c)
		}
	}
	if len(missing) > 0 && !cfg.AllowPartial {
		why := "boot with them enabled"
		if len(onV1) > 0 {
			why = "cgroup v1 has " + strings.Join(onV1, ", ") + ": boot with systemd.unified_cgroup_hierarchy=1"
		}
		return nil, fmt.Errorf("cgroup v2 at %s lacks %s; %s or set cgroups.allow_partial = true",
			h.root, strings.Join(missing, ", "), why)
	}
	if len(onV1) > 0 {
		t.mode = Hybrid
	}
	dirs := map[string]bool{}
	for c, root := range h.v1 {
		t.v1[c] = filepath.Join(root, cfg.Slice)
		dirs[t.v1[c]] = true
	}
	t.hierarchies = append([]string{t.v2}, slices.Sorted(maps.Keys(dirs))...)
	return t, nil
}

// v1Name is the name that cgroup v1 gives to a controller of v2.
func v1Name(controller string) string {
	if controller == "io" {
		return "blkio"
	}
	return controller
}

func (t *Tree) makeSlice(root string) error {
	if err := t.enable(root); err != nil {
		return err
	}
	for _, dir := range t.ownHierarchies() {
		if err := makeDir(dir); err != nil {
			return err
		}
	}
	if dir, ok := t.onV1("memory"); ok {
		if err := useHierarchy(dir); err != nil {
			return err
		}
	}
	return t.enable(t.v2)
}

// ownHierarchies answers the slice in the hierarchies where this package
// makes nodes: v2, and those of v1 whose limits or figures it uses. The
// runtime makes what it needs in the others.
func (t *Tree) ownHierarchies() []string {
	dirs := []string{t.v2}
	for _, c := range []string{"cpu", "cpuacct", "memory", "pids"} {
		if dir, ok := t.onV1(c); ok && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// onV1 answers the slice's directory of a controller that is to be used on
// cgroup v1: one that v2 does not have.
func (t *Tree) onV1(controller string) (string, bool) {
	if t.onV2(controller) {
		return "", false
	}
	dir, ok := t.v1[controller]
	return dir, ok
}

// onV2 reports whether a controller is used on cgroup v2. CPU time is
// accounted there with the cpu controller.
func (t *Tree) onV2(controller string) bool {
	if controller == "cpuacct" {
		controller = "cpu"
	}
	return slices.Contains(t.controllers, controller)
}

// Mode says where the controllers are.
func (t *Tree) Mode() Mode { return t.mode }

// NotEnforced says in words what this host cannot enforce; empty if it can do
// everything.
func (t *Tree) NotEnforced() []string { return slices.Clone(t.notEnforced) }

// Close leaves the tree as it is.
func (t *Tree) Close() error { return nil }

func (t *Tree) shortcomings() []string {
	var all []string
	for _, s := range []string{cpuShortcoming(t), memoryShortcoming(t), swapShortcoming(t), pidsShortcoming(t), ioShortcoming(t), killShortcoming(t)} {
		if s != "" {
			all = append(all, s)
		}
	}
	return all
}
