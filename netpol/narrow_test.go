// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// tree is a policy as YAML sees it: map[string]any, []any and strings.
func tree(p Policy) map[string]any {
	targets := func(to []Target) []any {
		var out []any
		for _, t := range to {
			m := map[string]any{t.key(): t.String()}
			if t.AllowPrivate {
				m["allow_private"] = true
			}
			var except []any
			for _, e := range t.Except {
				except = append(except, e.String())
			}
			if except != nil {
				m["except"] = except
			}
			out = append(out, m)
		}
		return out
	}
	ports := func(in []PortRange) []any {
		var out []any
		for _, r := range in {
			out = append(out, r.String())
		}
		return out
	}
	rules := []any{}
	for _, r := range p.Rules {
		m := map[string]any{"name": r.Name, "action": r.Action.String(), "to": targets(r.To)}
		if r.Rate != 0 {
			m["rate"] = FormatRate(r.Rate)
		}
		if r.Ports != nil {
			m["ports"] = ports(r.Ports)
		}
		rules = append(rules, m)
	}
	doc := map[string]any{"kind": Kind, "name": "p", "mode": p.Mode.String(), "rules": rules}
	var budgets []any
	for _, b := range p.Budgets {
		budgets = append(budgets, map[string]any{"egress": FormatSize(b.Bytes), "per": b.Per.String(), "then": "block", "scope": b.Scope.String()})
	}
	if budgets != nil {
		doc["budget"] = budgets
	}
	if p.Guardrail != nil {
		bounds := []any{}
		for _, b := range p.Guardrail.Bounds {
			bounds = append(bounds, map[string]any{"to": targets(b.To), "ports": ports(b.Ports)})
		}
		doc["guardrail"] = bounds
	}
	return doc
}

// cut is a tree with one key or list item removed.
type cut struct {
	path  string
	after any
}

// cuts lists every way to remove one key or item from a tree, but for those
// that remove a restriction in plain sight. deny: n belongs to a deny rule.
func cuts(n any, path string, deny bool) []cut {
	var out []cut
	switch n := n.(type) {
	case map[string]any:
		if n["action"] == "deny" {
			deny = true
		}
		for k, v := range n {
			switch {
			case k == "except" && !deny:
				continue
			case k == "guardrail":
				out = append(out, with(cuts(v, path+"/"+k, deny), func(v any) any { return setKey(n, k, v) })...)
				continue
			case k == "rate":
				continue
			case k == "budget": // a budget as a whole is a restriction in plain sight, its parts are not
				out = append(out, with(parts(v.([]any), path), func(v any) any { return setKey(n, k, v) })...)
				continue
			}
			out = append(out, cut{path + "/" + k, dropKey(n, k)})
			out = append(out, with(cuts(v, path+"/"+k, deny), func(v any) any { return setKey(n, k, v) })...)
		}
	case []any:
		for i, v := range n {
			at := fmt.Sprintf("%s/%d", path, i)
			if m, ok := v.(map[string]any); !deny && (!ok || m["action"] != "deny") {
				out = append(out, cut{at, append(append([]any{}, n[:i]...), n[i+1:]...)})
			}
			out = append(out, with(cuts(v, at, deny), func(v any) any {
				list := append([]any{}, n...)
				list[i] = v
				return list
			})...)
		}
	}
	return out
}

// parts lists the ways to remove one key of one of the mappings of a list.
func parts(list []any, path string) []cut {
	var out []cut
	for i, v := range list {
		m := v.(map[string]any)
		for k := range m {
			changed := append([]any{}, list...)
			changed[i] = dropKey(m, k)
			out = append(out, cut{fmt.Sprintf("%s/budget/%d/%s", path, i, k), changed})
		}
	}
	return out
}

func with(in []cut, wrap func(any) any) []cut {
	for i := range in {
		in[i].after = wrap(in[i].after)
	}
	return in
}

func setKey(m map[string]any, key string, v any) map[string]any {
	out := dropKey(m, key)
	out[key] = v
	return out
}

func dropKey(m map[string]any, key string) map[string]any {
	out := map[string]any{}
	for k, v := range m {
		if k != key {
			out[k] = v
		}
	}
	return out
}

func parseTree(t *testing.T, tenant string, doc any) (Layer, error) {
	t.Helper()
	data, err := yaml.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Parse("p.yaml", data)
	return Layer{Tenant: tenant, Policy: p}, err
}

// TestRemovingNeverWidens takes one key or item at a time out of one layer of
// random chains. Either the rest is refused or it allows nothing new. The
// exceptions are what the package documentation says they are.
func TestRemovingNeverWidens(t *testing.T) {
	compared, refused := 0, 0
	for seed := range uint64(60) {
		chain := randomChain(rand.New(rand.NewPCG(seed, 2)))
		var docs []map[string]any
		var layers []Layer
		for _, l := range chain {
			doc := tree(l.Policy)
			parsed, err := parseTree(t, l.Tenant, doc)
			if err != nil {
				break // an exception twice, say
			}
			docs, layers = append(docs, doc), append(layers, parsed)
		}
		before, err := Compile(layers)
		if err != nil || len(docs) < len(chain) {
			continue
		}
		for i := range docs {
			for _, c := range cuts(docs[i], layers[i].Tenant, false) {
				after, err := parseTree(t, layers[i].Tenant, c.after)
				if err == nil {
					changed := append([]Layer{}, layers...)
					changed[i] = after
					var prog Program
					if prog, err = Compile(changed); err == nil {
						compared++
						noWider(t, fmt.Sprintf("seed %d without %s", seed, c.path), before, prog)
					}
				}
				if err != nil {
					refused++
				}
			}
		}
	}
	t.Logf("%d removals compared, %d refused", compared, refused)
	if compared < 200 || refused < 200 {
		t.Errorf("got %d removals compared and %d refused, too few to prove anything", compared, refused)
	}
}

func noWider(t *testing.T, what string, before, after Program) {
	t.Helper()
	wider := func(f Flow, names ...string) {
		if after.Evaluate(f, names...).Allowed && !before.Evaluate(f, names...).Allowed {
			t.Fatalf("%s: %s %s port %d names %q became allowed\nbefore:\n%s\nafter:\n%s",
				what, f.Proto, f.Dst, f.Port, names, before.Describe(), after.Describe())
		}
	}
	for i, a := range universe() {
		for port := range uint16(15) {
			for _, proto := range []Proto{TCP, UDP, ICMP} {
				wider(Flow{proto, a, port})
				wider(Flow{proto, a, port}, someNames[(i+int(port))%len(someNames)])
			}
		}
	}
	for _, name := range someNames {
		was, is := before.Name(name), after.Name(name)
		if (is.Allowed || is.Audit) && !was.Allowed && !was.Audit {
			t.Fatalf("%s: name %s was %+v and became %+v", what, name, was, is)
		}
	}
	for _, b := range before.Budgets {
		// One budget for all is narrower than one of the same size for each.
		if !slices.ContainsFunc(after.Budgets, func(a ProgramBudget) bool {
			return a.Tenant == b.Tenant && a.Scope <= b.Scope && a.Per == b.Per && a.Bytes <= b.Bytes
		}) {
			t.Fatalf("%s: budgets %+v became %+v", what, before.Budgets, after.Budgets)
		}
	}
}

// TestDenyWithoutItsActionIsRefused is the case that makes action required.
func TestDenyWithoutItsActionIsRefused(t *testing.T) {
	deny := rule("action: deny", `to: [{cidr: 0.0.0.0/0}]`, "ports: [25/tcp]")
	if _, err := Parse("p.yaml", []byte(deny)); err != nil {
		t.Fatal(err)
	}
	_, err := Parse("p.yaml", []byte(strings.Replace(deny, "  action: deny\n", "", 1)))
	if err == nil {
		t.Error("a rule without an action was accepted")
	}
}
