// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"strings"

	"go.yaml.in/yaml/v3"
)

var (
	scopes  = []Scope{ScopeTenant, ScopeSandbox}
	windows = []Window{PerHour, PerDay, PerMonth}
)

func names[T interface{ String() string }](of []T) []string {
	out := make([]string, len(of))
	for i, v := range of {
		out[i] = v.String()
	}
	return out
}

// oneOf reads a word that must be the name of one of known.
func oneOf[T interface{ String() string }](d *Document, n *yaml.Node, what string, known []T) T {
	s, ok := d.Text(n, what)
	for _, k := range known {
		if ok && k.String() == s {
			return k
		}
	}
	if ok {
		d.Errorf(n, "unknown %s %q%s", what, clip(s), Suggest(s, names(known)))
	}
	return known[0]
}

// rate reads one speed. It answers 0 after an error.
func (d *Document) rate(n *yaml.Node, what string) uint64 {
	s, ok := d.Scalar(n, what)
	if !ok {
		return 0
	}
	bits, err := ParseRate(s)
	if err != nil {
		d.Errorf(n, "%s: %v", what, err)
	}
	return bits
}

// rates reads the rate of a policy, by scope.
func (d *Document) rates(n *yaml.Node) []RateLimit {
	if n.Kind == yaml.ScalarNode && n.Tag != "!!null" {
		d.Errorf(n, "rate of the policy must say whose it is: write {sandbox: %s} for each sandbox, or {tenant: %s} for all of the tenant together",
			clip(n.Value), clip(n.Value))
		return nil
	}
	f := d.Fields(n, "rate of the policy", names(scopes)...)
	if n.Kind == yaml.MappingNode && len(n.Content) == 0 {
		d.Errorf(n, "rate of the policy is empty: write {sandbox: 1Gbit}, {tenant: 5Gbit} or both, or remove it")
	}
	var out []RateLimit
	for _, s := range scopes {
		if v := f[s.String()]; v != nil {
			out = append(out, RateLimit{Scope: s, Bits: d.rate(v, s.String()+" rate"), Line: v.Line})
		}
	}
	return out
}

// budgets reads one budget or a list of them, one of each scope.
func (d *Document) budgets(n *yaml.Node) []Budget {
	items := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode {
		items = n.Content
		if len(items) == 0 {
			d.Errorf(n, "budget is empty: list at least one or remove it")
		}
	}
	var out []Budget
	first := map[Scope]int{}
	for _, item := range items {
		b, ok := d.budget(item)
		switch {
		case !ok:
		case first[b.Scope] != 0:
			d.Errorf(item, "policy has two budgets of scope %s, the first on line %d: keep the one that matters", b.Scope, first[b.Scope])
		default:
			first[b.Scope] = item.Line
			out = append(out, b)
		}
	}
	return out
}

// budget says with "then" what happens beyond it, so that nobody takes it for
// a warning.
func (d *Document) budget(n *yaml.Node) (Budget, bool) {
	b := Budget{Line: n.Line}
	f := d.Fields(n, "budget", "egress", "per", "then", "scope")
	if n.Kind != yaml.MappingNode {
		return b, false
	}
	if f["egress"] == nil {
		d.Errorf(n, "budget has no egress: write how many bytes may leave, as in 50GiB")
	} else if s, ok := d.Scalar(f["egress"], "egress of budget"); ok {
		b.Bytes = d.budgetBytes(f["egress"], s)
	}
	if f["per"] == nil {
		d.Errorf(n, "budget has no per: write %s", strings.Join(names(windows), ", "))
	} else {
		b.Per = oneOf(d, f["per"], "per of budget", windows)
	}
	if f["then"] == nil {
		d.Errorf(n, `budget has no then: write "then: block"`)
	} else if s, ok := d.Text(f["then"], "then of budget"); ok && s != "block" {
		d.Errorf(f["then"], `unknown then of budget %q: known is block, which drops what goes beyond it`, clip(s))
	}
	if f["scope"] != nil {
		b.Scope = oneOf(d, f["scope"], "scope of budget", scopes)
	}
	return b, true
}

func (d *Document) budgetBytes(n *yaml.Node, s string) uint64 {
	bytes, err := ParseSize(s)
	switch _, unit := SplitUnit(s); {
	case err != nil:
		d.Errorf(n, "egress of budget: %v", err)
	case unit == "" && bytes != 0:
		d.Errorf(n, "egress of budget: %s has no unit, write %sB or one of KiB, MiB, GiB, TiB", clip(s), clip(s))
	case bytes == 0:
		d.Errorf(n, "egress of budget: zero would block everything: remove the rules for that")
	}
	return uint64(bytes)
}
