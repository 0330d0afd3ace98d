// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"net/netip"
	"slices"
)

// ReferenceEvaluate decides a flow to an address that names were resolved to,
// straight from the layers, by the words of the package documentation and
// without Compile. It is what Compile is tested against. Rule counts the rules
// of all layers in order, as Compile does.
func ReferenceEvaluate(layers []Layer, f Flow, names ...string) Verdict {
	watching := auditFrom(layers)
	byAddr := func(t Target) bool { return t.FQDN == "" && inTarget(t, f.Dst) }

	watched := firstRule(layers, Deny, func(l int, r Rule) bool { return slices.ContainsFunc(r.To, byAddr) && inPorts(r, f) })
	if watched.id >= 0 && watched.layer < watching {
		return Verdict{Reason: ReasonDenied, Rule: watched.id}
	}
	allowed := firstRule(layers, Allow, func(l int, r Rule) bool {
		return slices.ContainsFunc(r.To, byAddr) && inPorts(r, f) && inGuardrails(layers[:l], f, "")
	})
	audit := watching < len(layers) && inRanges(everyPort(), f)
	open := audit && inGuardrails(layers[:watching], f, "")
	switch {
	case watched.id >= 0 && (open || allowed.id >= 0):
		return Verdict{Allowed: true, Reason: ReasonAllowed, Rule: watched.id, Audit: ReasonDenied}
	case watched.id >= 0:
		return Verdict{Reason: ReasonDenied, Rule: watched.id}
	case allowed.id >= 0:
		return Verdict{Allowed: true, Reason: ReasonAllowed, Rule: allowed.id}
	}

	best := found{id: -1}
	for _, name := range names {
		if refused(layers[:watching], name) || SpecialUse(f.Dst) {
			continue
		}
		by := firstRule(layers, Allow, func(l int, r Rule) bool {
			return slices.ContainsFunc(r.To, byName(name, f)) && inPorts(r, f) && inGuardrails(layers[:l], f, name)
		})
		if by.id >= 0 && (best.id < 0 || by.id < best.id) {
			best = by
		}
		open = open || audit && inGuardrails(layers[:watching], f, name)
	}
	switch {
	case best.id >= 0:
		return Verdict{Allowed: true, Reason: ReasonAllowed, Rule: best.id}
	case open:
		return Verdict{Allowed: true, Reason: ReasonAllowed, Rule: -1, Audit: ReasonNoRule}
	}
	return Verdict{Reason: ReasonNoRule, Rule: -1}
}

type found struct{ id, layer int }

// firstRule finds the first rule of an action for which holds is true. Its id
// is -1 if there is none.
func firstRule(layers []Layer, action Action, holds func(layer int, r Rule) bool) found {
	id := 0
	for i, l := range layers {
		for _, r := range l.Policy.Rules {
			if r.Action == action && holds(i, r) {
				return found{id, i}
			}
			id++
		}
	}
	return found{-1, -1}
}

// refused says whether a deny rule of the layers matches a name.
func refused(layers []Layer, name string) bool {
	return firstRule(layers, Deny, func(_ int, r Rule) bool {
		return slices.ContainsFunc(r.To, func(t Target) bool { return t.FQDN != "" && MatchName(t.FQDN, name) })
	}).id >= 0
}

// byName matches the targets that a name gives at the flow's address.
func byName(name string, f Flow) func(Target) bool {
	return func(t Target) bool {
		return t.FQDN != "" && MatchName(t.FQDN, name) && (t.AllowPrivate || !PrivateAddr(f.Dst))
	}
}

// inGuardrails says whether every guardrail of the layers leaves a flow open,
// by its address or by a name of it.
func inGuardrails(layers []Layer, f Flow, name string) bool {
	for _, l := range layers {
		if l.Policy.Guardrail == nil {
			continue
		}
		open := slices.ContainsFunc(l.Policy.Guardrail.Bounds, func(b Bound) bool {
			return inRanges(b.Ports, f) && slices.ContainsFunc(b.To, func(t Target) bool {
				return t.FQDN == "" && inTarget(t, f.Dst) || name != "" && byName(name, f)(t)
			})
		})
		if !open {
			return false
		}
	}
	return true
}

func inTarget(t Target, a netip.Addr) bool {
	return t.CIDR.Contains(a) && !within(t.Except, a)
}

func inPorts(r Rule, f Flow) bool {
	if r.Action == Deny && len(r.Ports) == 0 {
		return inRanges(everyPort(), f)
	}
	return inRanges(r.Ports, f)
}

func inRanges(ports []PortRange, f Flow) bool {
	return slices.ContainsFunc(ports, func(p PortRange) bool {
		return p.Proto == f.Proto && p.Lo <= f.Port && f.Port <= p.Hi
	})
}
