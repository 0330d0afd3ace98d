// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"fmt"
	"net/netip"
	"slices"
)

// checkLayer refuses what Parse cannot make, so that a policy built by other
// means cannot mean something that the kernel would understand otherwise.
func (c *compiler) checkLayer(l Layer) {
	if l.Policy.Mode != ModeEnforce && l.Policy.Mode != ModeAudit {
		c.add(l, 0, "policy of %s has unknown %s", l.Tenant, l.Policy.Mode)
	}
	for _, r := range l.Policy.Rules {
		what := fmt.Sprintf("rule %q of %s", r.Name, l.Tenant)
		if r.Name == "" {
			c.add(l, r.Line, "a rule of %s has no name", l.Tenant)
		}
		if r.Action != Allow && r.Action != Deny {
			c.add(l, r.Line, "%s has unknown %s", what, r.Action)
		}
		if len(r.Ports) == 0 && r.Action != Deny {
			c.add(l, r.Line, "%s has no ports", what)
		}
		if r.Action == Deny && len(r.Ports) > 0 && hasName(r.To) && len(subtractPorts(everyPort(), mergePorts(r.Ports))) > 0 {
			c.add(l, r.Line, "%s denies an fqdn at some ports only: it refuses the name whatever the port is", what)
		}
		if r.Rate != 0 && (r.Action == Deny || r.Rate < MinRate) {
			c.add(l, r.Line, "%s has a rate that it cannot have: %d bits a second", what, r.Rate)
		}
		c.checkTargets(l, r.Line, what, r.To)
		c.checkPorts(l, r.Line, what, r.Ports)
	}
	if g := l.Policy.Guardrail; g != nil {
		for _, b := range g.Bounds {
			what := "a guardrail bound of " + l.Tenant
			if len(b.Ports) == 0 {
				c.add(l, b.Line, "%s has no ports", what)
			}
			c.checkTargets(l, b.Line, what, b.To)
			c.checkPorts(l, b.Line, what, b.Ports)
		}
	}
}

func (c *compiler) checkTargets(l Layer, line int, what string, to []Target) {
	if len(to) == 0 {
		c.add(l, line, "%s has no targets", what)
	}
	for _, t := range to {
		if t.FQDN != "" {
			c.checkNameTarget(l, line, what, t)
			continue
		}
		if why := badPrefix(t.CIDR); why != "" {
			c.add(l, line, "%s: cidr %s %s", what, t.CIDR, why)
			continue
		}
		for _, e := range t.Except {
			if why := badPrefix(e); why != "" {
				c.add(l, line, "%s: except %s %s", what, e, why)
			} else if !covers(t.CIDR, e) || e == t.CIDR {
				c.add(l, line, "%s: except %s does not lie inside %s", what, e, t.CIDR)
			}
		}
	}
}

func (c *compiler) checkNameTarget(l Layer, line int, what string, t Target) {
	pattern, err := ParsePattern(t.FQDN)
	switch {
	case err != nil:
		c.add(l, line, "%s: fqdn %q %v", what, clip(t.FQDN), err)
	case pattern != t.FQDN:
		c.add(l, line, "%s: fqdn %q must be written %s", what, clip(t.FQDN), pattern)
	case t.CIDR.IsValid() || len(t.Except) > 0:
		c.add(l, line, "%s: target %s has a cidr as well", what, t.FQDN)
	}
}

func (c *compiler) checkPorts(l Layer, line int, what string, ports []PortRange) {
	for _, r := range ports {
		if r.Lo > r.Hi || r.Proto != TCP && r.Proto != UDP && r != echoPort {
			c.add(l, line, "%s: bad port range %d-%d/%s", what, r.Lo, r.Hi, r.Proto)
		}
	}
}

// checkGuardrails refuses allow rules that an ancestor's guardrail makes
// useless in part: a person who wrote them believes that they work.
func (c *compiler) checkGuardrails() {
	for _, r := range c.rules {
		if r.rule.Action != Allow {
			continue
		}
		for _, ancestor := range c.layers[:r.layer] {
			if ancestor.Policy.Guardrail != nil {
				c.checkGuardrail(r, ancestor)
			}
		}
	}
}

func (c *compiler) checkGuardrail(r flatRule, ancestor Layer) {
	l, g := c.layers[r.layer], ancestor.Policy.Guardrail
	outside := func(line int, what string) {
		if line == 0 {
			line = r.rule.Line
		}
		c.add(l, line, "rule %q of %s: %s is outside the guardrail of %s (%s)",
			r.rule.Name, l.Tenant, what, ancestor.Tenant, place(ancestor, g.Line))
	}
	inside := make([]bool, len(r.ports))
	whole := true
	for _, t := range r.rule.To {
		reached, usable := false, false
		for _, b := range g.Bounds {
			if !slices.ContainsFunc(b.To, func(bt Target) bool { return reaches(bt, t) }) {
				continue
			}
			reached = true
			for i, p := range r.ports {
				if len(intersectPorts([]PortRange{p}, b.Ports)) > 0 {
					inside[i], usable = true, true
				}
			}
		}
		if !reached {
			outside(t.Line, t.String())
		} else if !usable {
			outside(t.Line, fmt.Sprintf("%s at %s", t, joinPorts(r.ports)))
		}
		if usable && t.AllowPrivate && !leavesPrivate(g, t) {
			outside(t.Line, t.FQDN+" with allow_private")
		}
		whole = whole && reached && usable
	}
	for i, ok := range inside {
		if whole && !ok {
			outside(0, r.ports[i].String())
		}
	}
}

// reaches says whether a target of a guardrail bound can leave open what t
// allows. Names may have addresses in any prefix.
func reaches(bound, t Target) bool {
	switch {
	case t.FQDN == "":
		return bound.FQDN == "" && overlap(t, bound)
	case bound.FQDN == "":
		return true
	}
	return patternCovers(bound.FQDN, t.FQDN)
}

// leavesPrivate says whether a guardrail can leave open private addresses of
// the names of t.
func leavesPrivate(g *Guardrail, t Target) bool {
	return slices.ContainsFunc(g.Bounds, func(b Bound) bool {
		return slices.ContainsFunc(b.To, func(bt Target) bool { return reaches(bt, t) && (bt.FQDN == "" || bt.AllowPrivate) })
	})
}

// overlap says whether two targets have a prefix in common that neither
// excepts.
func overlap(a, b Target) bool {
	if !a.CIDR.Overlaps(b.CIDR) {
		return false
	}
	common := a.CIDR
	if b.CIDR.Bits() > common.Bits() {
		common = b.CIDR
	}
	excepts := func(e netip.Prefix) bool { return covers(e, common) }
	return !slices.ContainsFunc(a.Except, excepts) && !slices.ContainsFunc(b.Except, excepts)
}
