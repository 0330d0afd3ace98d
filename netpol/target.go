// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"net/netip"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// purpose is what the targets of a list are for.
type purpose uint8

const (
	opens  purpose = iota // of an allow rule: each must be able to match
	closes                // of a deny rule
	bounds                // of a guardrail
)

// String is the pattern or the prefix.
func (t Target) String() string {
	if t.FQDN != "" {
		return t.FQDN
	}
	return t.CIDR.String()
}

// key is the key of the target in a policy.
func (t Target) key() string {
	if t.FQDN != "" {
		return "fqdn"
	}
	return "cidr"
}

func hasName(to []Target) bool {
	return slices.ContainsFunc(to, func(t Target) bool { return t.FQDN != "" })
}

// targets reads the to key of n. use is what they are for.
func (d *Document) targets(n *yaml.Node, f Fields, what string, use purpose) []Target {
	if f["to"] == nil {
		d.Errorf(n, "%s has no to: list where it leads, as in [{fqdn: api.example.com}] or [{cidr: 10.20.0.0/16}]", what)
		return nil
	}
	items, ok := d.List(f["to"], "to of "+what)
	if ok && len(items) == 0 {
		d.Errorf(f["to"], "to of %s is empty: it would match nothing, list at least one fqdn or cidr or remove the rule", what)
	}
	if len(items) > MaxTargets {
		d.Errorf(items[MaxTargets], "%s has %d targets, at most %d are allowed", what, len(items), MaxTargets)
		return nil
	}
	var out []Target
	firstLine := map[string]int{}
	for _, item := range items {
		t, ok := d.target(item, what, use)
		if !ok {
			continue
		}
		if first := firstLine[t.String()]; first != 0 {
			d.Errorf(item, "%s %s is in %s twice, first on line %d", t.key(), t, what, first)
			continue
		}
		firstLine[t.String()] = item.Line
		out = append(out, t)
	}
	return out
}

func (d *Document) target(n *yaml.Node, what string, use purpose) (Target, bool) {
	t := Target{Line: n.Line}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!str" {
		key := "fqdn"
		if _, err := netip.ParseAddr(n.Value); err == nil || strings.Contains(n.Value, "/") {
			key = "cidr"
		}
		d.Errorf(n, "target of %s must be a mapping: write {%s: %s}", what, key, clip(n.Value))
		return t, false
	}
	f := d.Fields(n, "target of "+what, "fqdn", "allow_private", "cidr", "except")
	switch {
	case n.Kind != yaml.MappingNode:
		return t, false
	case f["fqdn"] != nil && f["cidr"] != nil:
		d.Errorf(n, "target of %s has both fqdn and cidr: list them as two targets", what)
		return t, false
	case f["fqdn"] != nil:
		return d.nameTarget(t, f, what, use)
	case f["cidr"] == nil:
		d.Errorf(n, "target of %s has neither fqdn nor cidr", what)
		return t, false
	case f["allow_private"] != nil:
		d.Errorf(f["allow_private"], "allow_private belongs to an fqdn: a cidr says itself which addresses it means")
		return t, false
	}
	cidr, ok := d.prefix(f["cidr"], "cidr")
	if !ok {
		return t, false
	}
	t.CIDR = cidr
	if h, never := hardDenied(cidr); never && use == opens {
		d.Errorf(f["cidr"], "cidr %s can never match: %s is always denied (%s)", cidr, h.Prefix, h.Reason)
	}
	if f["except"] != nil {
		t.Except = d.except(f["except"], cidr)
	}
	return t, true
}

// nameTarget reads a target with an fqdn into t.
func (d *Document) nameTarget(t Target, f Fields, what string, use purpose) (Target, bool) {
	s, ok := d.Text(f["fqdn"], "fqdn")
	if !ok {
		return t, false
	}
	pattern, err := ParsePattern(s)
	if err != nil {
		d.Errorf(f["fqdn"], "fqdn %q of %s: %v", clip(s), what, err)
		return t, false
	}
	if use != closes && openToAll(pattern) {
		d.Errorf(f["fqdn"], "fqdn %s of %s matches names that anybody can register: write the domain, as in %s", pattern, what,
			strings.Replace(pattern, ".", ".example.", 1))
		return t, false
	}
	t.FQDN = pattern
	switch {
	case f["except"] != nil:
		d.Errorf(f["except"], "except belongs to a cidr: to refuse a name write a deny rule for it")
	case f["allow_private"] == nil:
	case use == closes:
		d.Errorf(f["allow_private"], "allow_private in %s: a deny rule refuses the name whatever its addresses are, remove it", what)
	default:
		t.AllowPrivate = d.flag(f["allow_private"], "allow_private")
	}
	return t, true
}

// flag reads true or false.
func (d *Document) flag(n *yaml.Node, what string) bool {
	if n == nil || n.Kind != yaml.ScalarNode || n.Tag != "!!bool" {
		d.Errorf(n, "%s must be true or false, not %s", what, describe(n))
		return false
	}
	return strings.EqualFold(n.Value, "true")
}
