// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"path"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// Bounds on what a caller may send. They keep a record far below bbolt's and
// gRPC's limits and a listing readable.
const (
	maxName    = 63
	maxImage   = 512
	maxArgs    = 1024
	maxArgLen  = 128 << 10
	maxTotal   = runtime.MaxSpecBytes // command and environment together
	maxLabels  = 64
	maxLabel   = 256
	maxPolicy  = 256 << 10
	maxRef     = 256
	maxTTL     = 366 * 24 * time.Hour
	minTTL     = time.Second
	minMemory  = 4 << 20 // below it runc itself does not start
	minCPU     = 10      // cfs quota of 1 ms in 100
	maxCPU     = 1 << 20
	maxPIDsCap = 4 << 20
)

var nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`)

// SpecError says which field of a Spec is wrong and what to write instead.
type SpecError struct{ Field, Msg string }

func (e *SpecError) Error() string { return e.Field + ": " + e.Msg }

func bad(field, format string, args ...any) error {
	return &SpecError{Field: field, Msg: fmt.Sprintf(format, args...)}
}

// Check refuses a Spec that no node could run. The error is a *SpecError.
func (s *Spec) Check() error {
	if err := checkName(s.Name); err != nil {
		return err
	}
	if _, err := tenant.ParsePath(string(s.Tenant)); err != nil {
		return bad("tenant", "%v", err)
	}
	if s.Image == "" {
		return bad("image", "is empty; name one that `bulkhead image ls` shows")
	}
	total := 0
	for _, f := range []struct {
		name string
		max  int
		vals []string
	}{
		{"image", maxImage, []string{s.Image}},
		{"command", maxArgLen, s.Command},
		{"env", maxArgLen, s.Env},
		{"workdir", maxArgLen, []string{s.Workdir}},
		{"user", maxLabel, []string{s.User}},
		{"workload", maxRef, []string{s.WorkloadRef}},
		{"policy", maxPolicy, []string{s.Policy}},
	} {
		if len(f.vals) > maxArgs {
			return bad(f.name, "has %d entries, at most %d", len(f.vals), maxArgs)
		}
		for _, v := range f.vals {
			if f.name == "command" || f.name == "env" {
				total += len(v) + 1
			}
			if err := checkText(f.name, v, f.max); err != nil {
				return err
			}
		}
	}
	if total > maxTotal {
		return bad("command", "and environment have %d bytes together, at most %d", total, maxTotal)
	}
	for _, e := range s.Env {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" {
			return bad("env", "%q is not KEY=value", e)
		}
	}
	if s.Workdir != "" && !path.IsAbs(s.Workdir) {
		return bad("workdir", "%q is not an absolute path", s.Workdir)
	}
	if s.TTL != 0 && (s.TTL < minTTL || s.TTL > maxTTL) {
		return bad("ttl", "%s is not between %s and %s", s.TTL, minTTL, maxTTL)
	}
	if s.RuntimeClass != "" && s.RuntimeClass != "runc" {
		return bad("runtime", "%q is unknown on this node; it has: runc", s.RuntimeClass)
	}
	if len(s.Labels) > maxLabels {
		return bad("labels", "%d of them, at most %d", len(s.Labels), maxLabels)
	}
	for k, v := range s.Labels {
		if k == "" {
			return bad("labels", "one has an empty key")
		}
		if err := checkText("labels", k, maxLabel); err != nil {
			return err
		}
		if err := checkText("labels", v, maxLabel); err != nil {
			return err
		}
	}
	return checkPublish(s.Publish)
}

func checkPublish(ports []Port) error {
	if len(ports) > netpol.MaxPublished {
		return bad("publish", "%d ports, at most %d", len(ports), netpol.MaxPublished)
	}
	type hostPort struct {
		port  uint16
		proto netpol.Proto
	}
	seen := map[hostPort]bool{}
	for _, p := range ports {
		host := hostPort{p.Host, p.Proto}
		switch {
		case p.Proto != netpol.TCP && p.Proto != netpol.UDP:
			return bad("publish", "%s: only tcp and udp can be published", p)
		case p.Host == 0 || p.Sandbox == 0:
			return bad("publish", "%s: write HOSTPORT:PORT, both from 1 to 65535", p)
		case seen[host]:
			return bad("publish", "port %d/%s of the node is named twice", p.Host, p.Proto)
		}
		seen[host] = true
	}
	return nil
}

func checkName(name string) error {
	switch {
	case name == "":
		return bad("name", "is empty")
	case !utf8.ValidString(name):
		return bad("name", "is not UTF-8")
	case len(name) > maxName:
		return bad("name", "has %d characters, at most %d", len(name), maxName)
	case !nameForm.MatchString(name):
		return bad("name", "%q: use letters, digits, '.', '_' and '-', a letter or digit first", name)
	case ValidID(name):
		return bad("name", "%q has the form of an id (12 characters of a-z and 2-7); choose another", name)
	}
	return nil
}

func checkText(field, v string, max int) error {
	switch {
	case len(v) > max:
		return bad(field, "%d bytes, at most %d", len(v), max)
	case !utf8.ValidString(v):
		return bad(field, "is not UTF-8")
	case strings.ContainsRune(v, 0):
		return bad(field, "contains a NUL character")
	}
	return nil
}

// Resolve fills limits that were left at zero from def and refuses those
// that the node could never give: node is what it has. The error is a
// *SpecError.
func (l Limits) Resolve(def, node Limits) (Limits, error) {
	for _, f := range []struct {
		name           string
		v              *int64
		def, min, node int64
		unit           string
	}{
		{"cpus", &l.CPUMillis, def.CPUMillis, minCPU, min(node.CPUMillis, maxCPU), "thousandths of a core"},
		{"memory", &l.MemoryBytes, def.MemoryBytes, minMemory, node.MemoryBytes, "bytes"},
		{"pids", &l.PIDs, def.PIDs, 1, min(node.PIDs, maxPIDsCap), "processes"},
	} {
		if *f.v == 0 {
			*f.v = min(f.def, f.node)
		}
		switch {
		case *f.v < 0:
			return l, bad(f.name, "%d %s is negative", *f.v, f.unit)
		case *f.v < f.min:
			return l, bad(f.name, "%d %s is too little, at least %d", *f.v, f.unit, f.min)
		case *f.v > f.node:
			return l, bad(f.name, "%d %s is more than this node has (%d)", *f.v, f.unit, f.node)
		}
	}
	return l, nil
}
