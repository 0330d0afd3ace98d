// SPDX-License-Identifier: Apache-2.0

// Package tenant is the tenancy domain: paths, quotas, members and how policy
// is inherited down the tree.
//
// It owns the tenant files of a node and what they mean. It never counts what
// is in use (agent/admit does) and never enforces anything. A Set is whole or
// it is not made: Load refuses a directory that has any fault, and a Set never
// changes, so readers need no lock.
package tenant

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// Quota is the most that a tenant and all below it may hold at once. Zero
// means no limit of its own; those of its ancestors still hold.
type Quota struct {
	CPUMillis   int64
	MemoryBytes int64
	PIDs        int64
	Sandboxes   int64
}

// Tenant is one node of the tenancy tree.
type Tenant struct {
	Path    Path
	Quota   Quota
	Policy  *netpol.Policy // nil: adds no rules and no guardrail; not to be changed
	Members []uint32       // unix users of the node who may act for it and all below
	File    string         // file it was read from

	policyFile string // file of the policy; File if it is inline
	lines      lines
}

// lines says where in File things are; 0 if unknown.
type lines struct {
	path  int
	quota map[string]int
}

// Set is the tenancy tree of a node. It does not change; its methods may be
// called at the same time.
type Set struct {
	tenants []Tenant // sorted by path, so a parent stands before its children
	index   map[Path]int
}

// ErrUnknown is the error for a path that is not in the set.
var ErrUnknown = errors.New("tenant is not known")

// NewSet makes a Set of tenants. It checks what Load checks across files:
// every parent exists, no path is there twice, no quota is above an
// ancestor's, and every chain of policies compiles. Errors are *netpol.Error,
// joined if there are several.
func NewSet(tenants ...Tenant) (*Set, error) {
	s, errs := newSet(tenants)
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return s, nil
}

func newSet(tenants []Tenant) (*Set, []error) {
	s := &Set{index: map[Path]int{}}
	var errs []error
	sorted := slices.Clone(tenants)
	slices.SortStableFunc(sorted, func(a, b Tenant) int { return comparePaths(a.Path, b.Path) })
	for _, t := range sorted {
		if _, err := ParsePath(string(t.Path)); err != nil {
			errs = append(errs, t.errorf(t.lines.path, "%v", err))
			continue
		}
		if i, dup := s.index[t.Path]; dup {
			errs = append(errs, t.errorf(t.lines.path, "tenant %s is already defined in %s", t.Path, s.tenants[i].where(s.tenants[i].lines.path)))
			continue
		}
		s.index[t.Path] = len(s.tenants)
		s.tenants = append(s.tenants, t)
	}
	for _, t := range s.tenants {
		errs = append(errs, s.check(t)...)
	}
	return s, errs
}

// comparePaths orders a parent right before its children, segment by segment.
func comparePaths(a, b Path) int {
	return slices.Compare(strings.Split(string(a), "/"), strings.Split(string(b), "/"))
}

// check holds one tenant against its ancestors.
func (s *Set) check(t Tenant) []error {
	var errs []error
	if parent := t.Path.Parent(); parent != "" {
		if _, ok := s.index[parent]; !ok {
			return []error{t.errorf(t.lines.path, "tenant %s has no parent: write a file for %s first%s", t.Path, parent, s.nearest(parent))}
		}
	}
	for _, q := range quotaKeys {
		own := *q.field(&t.Quota)
		if own == 0 {
			continue
		}
		for _, a := range slices.Backward(s.Chain(t.Path.Parent())) {
			if limit := *q.field(&a.Quota); limit != 0 {
				if own > limit {
					errs = append(errs, t.errorf(t.lines.quota[q.key], "%s quota %s %s is above %s's %s (%s)",
						t.Path, q.key, q.show(own), a.Path, q.show(limit), a.where(a.lines.quota[q.key])))
				}
				break // the ancestor's own limit is checked against those above it
			}
		}
	}
	// The layers are those of the tenant and its ancestors. If an ancestor's
	// chain does not compile, that is said where it belongs, and once.
	if parent := t.Path.Parent(); parent != "" {
		if _, err := netpol.Compile(s.Policies(parent)); err != nil {
			return errs
		}
	}
	if _, err := netpol.Compile(s.Policies(t.Path)); err != nil {
		errs = append(errs, err)
	}
	return errs
}

// nearest suggests a known path for one that is not.
func (s *Set) nearest(path Path) string {
	known := make([]string, 0, len(s.tenants))
	for _, t := range s.tenants {
		if t.Path.Depth() == path.Depth() {
			known = append(known, string(t.Path))
		}
	}
	hint := netpol.Suggest(string(path), known)
	if !strings.Contains(hint, "did you mean") {
		return ""
	}
	return hint
}

// errorf is an error at a line of the tenant's file.
func (t Tenant) errorf(line int, format string, args ...any) error {
	return &netpol.Error{File: t.File, Line: line, Msg: fmt.Sprintf(format, args...)}
}

// where names a line of the tenant's file for the middle of a message.
func (t Tenant) where(line int) string {
	switch {
	case t.File == "":
		return "tenant " + string(t.Path)
	case line == 0:
		return t.File
	}
	return fmt.Sprintf("%s:%d", t.File, line)
}

// clone lets callers change what they get, but for the policy.
func (t Tenant) clone() Tenant {
	t.Members = slices.Clone(t.Members)
	return t
}

// Get answers the tenant at path.
func (s *Set) Get(path Path) (Tenant, bool) {
	i, ok := s.index[path]
	if !ok {
		return Tenant{}, false
	}
	return s.tenants[i].clone(), true
}

// All lists the tenants by path, parents before children.
func (s *Set) All() []Tenant {
	out := make([]Tenant, len(s.tenants))
	for i, t := range s.tenants {
		out[i] = t.clone()
	}
	return out
}

// Chain lists the ancestors of path, the organisation first, and then the
// tenant itself. It is empty if path is not known.
func (s *Set) Chain(path Path) []Tenant {
	if _, ok := s.index[path]; !ok {
		return nil
	}
	var out []Tenant
	for _, p := range append(path.Ancestors(), path) {
		if t, ok := s.Get(p); ok {
			out = append(out, t)
		}
	}
	return out
}

// Policies lists the policies that hold for path, ancestors first. Tenants
// without a policy have no layer.
func (s *Set) Policies(path Path) []netpol.Layer {
	var out []netpol.Layer
	for _, t := range s.Chain(path) {
		if t.Policy != nil {
			file := t.policyFile
			if file == "" {
				file = t.File
			}
			out = append(out, netpol.Layer{Tenant: string(t.Path), File: file, Policy: *t.Policy})
		}
	}
	return out
}

// Compile makes the program of a sandbox of path. extra is the sandbox's own
// policy, if it has one: one more layer below the tenant's, bound by the
// guardrails of the tenant and all its ancestors. Its rates and budgets must be
// of scope sandbox: what all of a tenant may use is in the tenant's file. The
// error is ErrUnknown if path is not known.
func (s *Set) Compile(path Path, extra *netpol.Policy) (netpol.Program, error) {
	if _, ok := s.index[path]; !ok {
		return netpol.Program{}, fmt.Errorf("compile policy of %s: %w", path, ErrUnknown)
	}
	layers := s.Policies(path)
	if extra != nil {
		if err := checkOwn(extra); err != nil {
			return netpol.Program{}, fmt.Errorf("compile policy of %s: %w", path, err)
		}
		layers = append(layers, netpol.Layer{Tenant: string(path), File: extra.Source, Policy: *extra})
	}
	p, err := netpol.Compile(layers)
	if err != nil {
		return netpol.Program{}, fmt.Errorf("compile policy of %s: %w", path, err)
	}
	return p, nil
}

// checkOwn refuses limits of a sandbox's own policy that would be those of its
// whole tenant.
func checkOwn(p *netpol.Policy) error {
	for _, r := range p.Rates {
		if r.Scope != netpol.ScopeSandbox {
			return &netpol.Error{File: p.Source, Line: r.Line, Msg: "a sandbox's own policy sets no rate for its tenant: write {sandbox: " + netpol.FormatRate(r.Bits) + "}"}
		}
	}
	for _, b := range p.Budgets {
		if b.Scope != netpol.ScopeSandbox {
			return &netpol.Error{File: p.Source, Line: b.Line, Msg: `a sandbox's own policy sets no budget for its tenant: add "scope: sandbox"`}
		}
	}
	return nil
}

// MayAct says whether a unix user of the node may act for path: root may, and
// so may members of the tenant or of one of its ancestors. It does not say
// that path exists.
func (s *Set) MayAct(uid uint32, path Path) bool {
	if uid == 0 {
		return true
	}
	for _, p := range append(path.Ancestors(), path) {
		if i, ok := s.index[p]; ok && slices.Contains(s.tenants[i].Members, uid) {
			return true
		}
	}
	return false
}
