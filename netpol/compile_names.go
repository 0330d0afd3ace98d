// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"cmp"
	"slices"
	"strings"
)

// auditFrom answers the first layer of those at the end of a chain that only
// watch; the number of layers if there are none.
func auditFrom(layers []Layer) int {
	i := len(layers)
	for i > 0 && layers[i-1].Policy.Mode == ModeAudit {
		i--
	}
	return i
}

// names fills in what the program says about names, and the guardrails that
// it takes for that.
func (c *compiler) names() {
	audit := c.auditFrom < len(c.layers)
	if audit {
		c.prog.Mode = ModeAudit
	}
	before := make([]int, len(c.layers)+1) // guardrails before a layer
	var rails []Rail
	for i, l := range c.layers {
		if l.Policy.Guardrail != nil {
			rails = append(rails, plainRail(l.Tenant, l.Policy.Guardrail))
		}
		before[i+1] = len(rails)
	}
	for _, r := range c.rules {
		for _, t := range r.rule.To {
			if t.FQDN == "" {
				continue
			}
			n := NameRule{Pattern: t.FQDN, Rule: r.id, AllowPrivate: t.AllowPrivate, Ports: r.ports}
			if r.rule.Action == Deny {
				n = NameRule{Pattern: t.FQDN, Rule: r.id, Deny: true, Audit: r.layer >= c.auditFrom}
			} else {
				n.Within = before[r.layer]
			}
			c.prog.Names = append(c.prog.Names, n)
		}
	}
	c.prog.byPattern = map[string][]int{}
	for i, n := range c.prog.Names {
		c.prog.byPattern[n.Pattern] = append(c.prog.byPattern[n.Pattern], i)
	}
	c.checkNameSteps()
	if audit {
		c.prog.AuditIn = before[c.auditFrom]
	}
	if audit || len(c.prog.Names) > 0 {
		c.prog.Rails = rails
	}
}

// checkNameSteps refuses patterns whose names surely take more steps than an
// address can have. Guardrails are not looked at: they can make it fewer.
func (c *compiler) checkNameSteps() {
	byPattern := map[string][]NameRule{}
	for _, n := range c.prog.Names {
		if !n.Deny {
			byPattern[n.Pattern] = append(byPattern[n.Pattern], n)
		}
	}
	said := map[string]bool{}
	for _, n := range c.prog.Names {
		if n.Deny || said[n.Pattern] {
			continue
		}
		var all []NameRule
		for _, wider := range widerPatterns(n.Pattern) {
			all = append(all, byPattern[wider]...)
		}
		slices.SortStableFunc(all, func(a, b NameRule) int { return cmp.Compare(a.Rule, b.Rule) })
		s := steps{}
		var rules []string
		for _, n := range all {
			s.add(PortRule{Rule: n.Rule}, n.Ports)
			ref := c.prog.Rules[n.Rule]
			if r := ref.Tenant + "/" + ref.Name; !slices.Contains(rules, r) {
				rules = append(rules, r)
			}
		}
		if len(s.steps) > MaxLearnedSteps {
			said[n.Pattern] = true
			last := c.rules[all[len(all)-1].Rule]
			c.add(c.layers[last.layer], last.rule.Line,
				"%s takes more than %d port ranges to decide: join port ranges or rules; it is covered by %s",
				n.Pattern, MaxLearnedSteps, strings.Join(rules, ", "))
		}
	}
}

// widerPatterns lists the patterns that cover p, and p itself.
func widerPatterns(p string) []string {
	wild, rest := splitPattern(p)
	out := []string{p}
	if wild != "" {
		if wild == "*" {
			out = append(out, "**."+rest)
		}
	} else if _, parent, ok := strings.Cut(rest, "."); ok {
		out = append(out, "*."+parent, "**."+parent)
		rest = parent
	}
	for {
		_, parent, ok := strings.Cut(rest, ".")
		if !ok {
			return out
		}
		out = append(out, "**."+parent)
		rest = parent
	}
}

// plainRail leaves out where a guardrail was written.
func plainRail(tenant string, g *Guardrail) Rail {
	r := Rail{Tenant: tenant}
	for _, b := range g.Bounds {
		b.Line, b.To, b.Ports = 0, slices.Clone(b.To), mergePorts(b.Ports)
		for i := range b.To {
			b.To[i].Line = 0
		}
		r.Bounds = append(r.Bounds, b)
	}
	return r
}

// limits collects the rates and budgets of all layers. A sandbox's own policy
// has the tenant of the layer above it: of two limits of one tenant and scope
// the lower holds.
func (c *compiler) limits() {
	for _, l := range c.layers {
		for _, r := range l.Policy.Rates {
			c.addRate(l, r)
		}
		for _, b := range l.Policy.Budgets {
			c.addBudget(l, b)
		}
	}
	if len(c.layers) == 0 {
		return
	}
	last := c.layers[len(c.layers)-1]
	for what, n := range map[string]int{"rates": len(c.prog.Rates), "budgets": len(c.prog.Budgets)} {
		if n > MaxLevels {
			c.add(last, 0, "%s has %d %s together with its ancestors, at most %d are allowed: remove some", last.Tenant, n, what, MaxLevels)
		}
	}
}

func (c *compiler) addRate(l Layer, r RateLimit) {
	if r.Scope > ScopeSandbox || r.Bits < MinRate {
		c.add(l, r.Line, "%s has a bad rate of %s: %d bits a second", l.Tenant, r.Scope, r.Bits)
		return
	}
	for i, o := range c.prog.Rates {
		if o.Tenant == l.Tenant && o.Scope == r.Scope {
			c.prog.Rates[i].Bits = min(o.Bits, r.Bits)
			return
		}
	}
	c.prog.Rates = append(c.prog.Rates, ProgramRate{l.Tenant, r.Scope, r.Bits})
}

func (c *compiler) addBudget(l Layer, b Budget) {
	if b.Scope > ScopeSandbox || b.Per > PerMonth || b.Bytes == 0 {
		c.add(l, b.Line, "%s has a bad budget of %s: %d bytes per %s", l.Tenant, b.Scope, b.Bytes, b.Per)
		return
	}
	for i, o := range c.prog.Budgets {
		if o.Tenant != l.Tenant || o.Scope != b.Scope {
			continue
		}
		if o.Per != b.Per {
			c.add(l, b.Line, "budget of scope %s per %s: %s has one per %s already, write this one per %s too", b.Scope, b.Per, l.Tenant, o.Per, o.Per)
			return
		}
		c.prog.Budgets[i].Bytes = min(o.Bytes, b.Bytes)
		return
	}
	c.prog.Budgets = append(c.prog.Budgets, ProgramBudget{l.Tenant, b.Scope, b.Bytes, b.Per})
}
