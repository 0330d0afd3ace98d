// SPDX-License-Identifier: Apache-2.0

package tenant

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"go.yaml.in/yaml/v3"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// Kind is what the kind key of a tenant file says.
const Kind = "Tenant"

// quotaKeys are the keys of a quota, in the order in which they are checked.
var quotaKeys = []struct {
	key   string
	field func(*Quota) *int64
	parse func(string) (int64, error)
	show  func(int64) string
}{
	{"cpu", func(q *Quota) *int64 { return &q.CPUMillis }, ParseCPU,
		func(v int64) string { return strconv.FormatFloat(float64(v)/1000, 'f', -1, 64) }},
	{"memory", func(q *Quota) *int64 { return &q.MemoryBytes }, ParseSize,
		func(v int64) string { return units.BytesSize(float64(v)) }},
	{"pids", func(q *Quota) *int64 { return &q.PIDs }, parseCount, showCount},
	{"sandboxes", func(q *Quota) *int64 { return &q.Sandboxes }, parseCount, showCount},
}

func showCount(v int64) string { return strconv.FormatInt(v, 10) }

func parseCount(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || strings.Trim(s, "0123456789") != "" {
		return 0, fmt.Errorf("%q is not a whole number", clip(s))
	}
	return n, nil
}

// Load reads the tenants of a node: every file of dir whose name ends in
// .yaml and does not begin with a dot. A file holds one Tenant, or one
// EgressPolicy that a tenant names in policy_file. Files in subdirectories are
// read only where a policy_file names them, and none outside dir is.
//
// An empty directory is a set without tenants. Load collects all faults and
// answers them joined, each an *netpol.Error with file and line; with a fault
// there is no set.
func Load(dir string) (*Set, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("load tenants: %w", err)
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".") // sorted
	if err != nil {
		return nil, fmt.Errorf("load tenants of %s: %w", dir, err)
	}
	l := loader{dir: dir, root: root, used: map[string]bool{}, policies: map[string]bool{}, faulty: map[string]bool{}}
	for _, e := range entries {
		name := e.Name()
		switch {
		case strings.HasPrefix(name, "."), e.IsDir():
		case strings.HasSuffix(name, ".yaml"):
			l.file(name)
		case strings.HasSuffix(name, ".yml"):
			l.fail(name, 0, "is not read: name it %s.yaml", strings.TrimSuffix(name, ".yml"))
		}
	}
	for _, e := range entries {
		if l.policies[e.Name()] && !l.used[e.Name()] {
			l.fail(e.Name(), 1, "is used by no tenant: name it in the policy_file of one, or remove it")
		}
	}
	set, errs := newSet(l.tenants)
	// A file with a fault has no tenant yet, so its children would seem to
	// lack a parent. The faults in the files come first and alone.
	if err := errors.Join(l.errs...); err != nil {
		return nil, err
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return set, nil
}

type loader struct {
	dir      string
	root     *os.Root
	tenants  []Tenant
	errs     []error
	policies map[string]bool // files of kind EgressPolicy
	faulty   map[string]bool // policy files whose faults are in errs
	used     map[string]bool // files that a policy_file names
}

func (l *loader) fail(name string, line int, format string, args ...any) {
	l.errs = append(l.errs, &netpol.Error{File: l.path(name), Line: line, Msg: fmt.Sprintf(format, args...)})
}

// path is the name of a file as the errors show it.
func (l *loader) path(name string) string { return filepath.Join(l.dir, name) }

// read reads a whole file of the directory, but never much more than may be
// parsed, and never from something that could block.
func (l *loader) read(name string) ([]byte, error) {
	info, err := l.root.Stat(name)
	if err != nil {
		return nil, reason(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("is not a regular file")
	}
	f, err := l.root.Open(name)
	if err != nil {
		return nil, reason(err)
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, netpol.MaxPolicyBytes+1))
}

// reason takes the operation and the path off an error whose message names
// the file already.
func reason(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

func (l *loader) file(name string) {
	data, err := l.read(name)
	if err != nil {
		l.fail(name, 0, "read: %v", err)
		return
	}
	d, err := netpol.ReadDocument(l.path(name), data)
	if err != nil {
		l.errs = append(l.errs, err)
		return
	}
	var t Tenant
	switch d.Kind(d.Root, Kind, netpol.Kind) {
	case netpol.Kind:
		l.policies[name] = true
		l.policy(name, data)
		return
	case Kind:
		t = l.tenant(d)
	}
	if err := d.Err(); err != nil {
		l.errs = append(l.errs, err)
		return
	}
	t.File = l.path(name)
	l.tenants = append(l.tenants, t)
}

func (l *loader) tenant(d *netpol.Document) Tenant {
	var t Tenant
	f := d.Fields(d.Root, "tenant", "kind", "path", "members", "quota", "policy", "policy_file")
	if f["path"] == nil {
		d.Errorf(d.Root, "tenant has no path")
	} else if s, ok := d.Text(f["path"], "path"); ok {
		path, err := ParsePath(s)
		if err != nil {
			d.Errorf(f["path"], "%v", err)
		}
		t.Path, t.lines.path = path, f["path"].Line
	}
	if f["members"] != nil {
		t.Members = members(d, f["members"])
	}
	if f["quota"] != nil {
		t.Quota, t.lines.quota = quota(d, f["quota"])
	}
	switch {
	case f["policy"] != nil && f["policy_file"] != nil:
		d.Errorf(f["policy_file"], "tenant has both policy and policy_file: keep one")
	case f["policy"] != nil:
		p := d.Policy(f["policy"])
		t.Policy = &p
	case f["policy_file"] != nil:
		t.Policy, t.policyFile = l.policyFile(d, f["policy_file"])
	}
	return t
}

// policyFile reads the file that a policy_file names.
func (l *loader) policyFile(d *netpol.Document, n *yaml.Node) (*netpol.Policy, string) {
	s, ok := d.Text(n, "policy_file")
	if !ok {
		return nil, ""
	}
	name := filepath.Clean(s)
	if !filepath.IsLocal(name) {
		d.Errorf(n, "policy_file %q leads out of %s: give a path below it", clip(s), l.dir)
		return nil, ""
	}
	l.used[name] = true
	data, err := l.read(name)
	if err != nil {
		d.Errorf(n, "policy_file %q: %v", clip(s), err)
		return nil, ""
	}
	p := l.policy(name, data)
	if p == nil {
		d.Errorf(n, "policy_file %q has errors", clip(s))
		return nil, ""
	}
	return p, l.path(name)
}

// policy parses a policy file. It records what is wrong with it once, however
// many tenants name it.
func (l *loader) policy(name string, data []byte) *netpol.Policy {
	p, err := netpol.Parse(l.path(name), data)
	if err == nil {
		return &p
	}
	if !l.faulty[name] {
		l.faulty[name] = true
		l.errs = append(l.errs, err)
	}
	return nil
}

func members(d *netpol.Document, n *yaml.Node) []uint32 {
	f := d.Fields(n, "members", "uids")
	if n.Kind != yaml.MappingNode {
		return nil
	}
	if f["uids"] == nil {
		d.Errorf(n, "members has no uids: list unix users, as in {uids: [1000]}, or remove it")
		return nil
	}
	items, _ := d.List(f["uids"], "uids")
	var out []uint32
	seen := map[uint32]bool{}
	for _, item := range items {
		s, ok := d.Scalar(item, "uid")
		if !ok {
			continue
		}
		uid, err := strconv.ParseUint(s, 10, 32)
		switch {
		case err != nil, uid == math.MaxUint32: // -1, which the kernel keeps for nobody
			d.Errorf(item, "uid %q is not a user id: write a number, 0 to 4294967294", clip(s))
			continue
		case seen[uint32(uid)]:
			d.Errorf(item, "uid %d is listed twice", uid)
		}
		seen[uint32(uid)] = true
		out = append(out, uint32(uid))
	}
	return out
}

func quota(d *netpol.Document, n *yaml.Node) (Quota, map[string]int) {
	known := make([]string, len(quotaKeys))
	for i, k := range quotaKeys {
		known[i] = k.key
	}
	var q Quota
	at := map[string]int{}
	f := d.Fields(n, "quota", known...)
	for _, k := range quotaKeys {
		v := f[k.key]
		if v == nil {
			continue
		}
		s, ok := d.Scalar(v, "quota "+k.key)
		if !ok {
			continue
		}
		amount, err := k.parse(s)
		if err == nil && amount == 0 {
			err = errors.New("zero would be no limit: leave the key out for that")
		}
		if err != nil {
			d.Errorf(v, "quota %s: %v", k.key, err)
			continue
		}
		*k.field(&q), at[k.key] = amount, v.Line
	}
	return q, at
}
