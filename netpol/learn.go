// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// NameVerdict is the decision about a name that a sandbox asks for. If neither
// Allowed nor Audit is set, the name must not be resolved.
type NameVerdict struct {
	Allowed      bool // by the rules in Rules
	Audit        bool // would be refused for Reason: it is resolved all the same, and that is recorded
	AllowPrivate bool // an answer may keep its private addresses: Learn says what they allow
	Rule         int  // the rule of Reason, index in Program.Rules; -1 if there is none
	Rules        []int
	Reason       string // ReasonAllowed, ReasonDenied or ReasonNoRule
}

// Name decides about a name, which is in lower case and has no final dot. A
// name that is not allowed may still be resolved for audit, and then Learn
// answers steps for its addresses only where a guardrail opens it by name; a
// name that an audited deny rule matches may be Allowed as well.
func (p Program) Name(name string) NameVerdict {
	v := NameVerdict{Rule: -1, Reason: ReasonNoRule}
	watched := -1 // the first deny rule that only watches
	for _, n := range p.matching(name) {
		switch {
		case n.Deny && !n.Audit:
			return NameVerdict{Rule: int(n.Rule), Reason: ReasonDenied}
		case n.Deny:
			if watched < 0 {
				watched = int(n.Rule)
			}
		case mayName(p.Rails[:n.Within], name, n.Ports):
			v.Allowed, v.AllowPrivate = true, v.AllowPrivate || n.AllowPrivate
			if !slices.Contains(v.Rules, int(n.Rule)) {
				v.Rules = append(v.Rules, int(n.Rule))
			}
		}
	}
	if v.Allowed {
		v.Rule, v.Reason = v.Rules[0], ReasonAllowed
	}
	audit := p.Mode == ModeAudit && mayName(p.Rails[:p.AuditIn], name, everyPort())
	switch {
	case watched >= 0:
		v.Rule, v.Reason, v.Audit = watched, ReasonDenied, v.Allowed || audit
	case !v.Allowed:
		v.Audit = audit
	}
	v.AllowPrivate = v.AllowPrivate || v.Audit && !v.Allowed
	return v
}

// matching answers the rules about names that match a name, in order. A policy
// may have thousands, and an answer hundreds of addresses.
func (p Program) matching(name string) []NameRule {
	var out []NameRule
	if p.byPattern == nil {
		for _, n := range p.Names {
			if MatchName(n.Pattern, name) {
				out = append(out, n)
			}
		}
		return out
	}
	var found []int
	for _, pattern := range widerPatterns(name) {
		found = append(found, p.byPattern[pattern]...)
	}
	slices.Sort(found)
	for _, i := range found {
		out = append(out, p.Names[i])
	}
	return out
}

// mayName says whether every rail can leave some of ports open for a name.
func mayName(rails []Rail, name string, ports []PortRange) bool {
	for _, rail := range rails {
		open := false
		for _, b := range rail.Bounds {
			reach := slices.ContainsFunc(b.To, func(t Target) bool { return t.FQDN == "" || MatchName(t.FQDN, name) })
			open = open || reach && len(intersectPorts(ports, b.Ports)) > 0
		}
		if !open {
			return false
		}
	}
	return true
}

// portsAt answers the ports that a rail leaves open at an address, by its
// prefixes and by its names if name is not "".
func (r Rail) portsAt(name string, a netip.Addr) []PortRange {
	private := PrivateAddr(a)
	holds := func(t Target) bool {
		if t.FQDN == "" {
			return inTarget(t, a)
		}
		return name != "" && MatchName(t.FQDN, name) && (t.AllowPrivate || !private)
	}
	var out []PortRange
	for _, b := range r.Bounds {
		if slices.ContainsFunc(b.To, holds) {
			out = append(out, b.Ports...)
		}
	}
	return mergePorts(out)
}

// inRails cuts ports down to what every rail leaves open.
func inRails(rails []Rail, name string, a netip.Addr, ports []PortRange) []PortRange {
	for _, r := range rails {
		ports = intersectPorts(ports, r.portsAt(name, a))
	}
	return ports
}

// Learn answers the steps that a name gives at an address that it resolved to:
// those of the rules that allow the name, cut down to the guardrails before
// them, and what passes for audit by the name. If there are none, nothing may
// be learned.
//
// Steps do not say that the flow passes: hard denies and the entries of the
// program come first.
func (p Program) Learn(name string, addr netip.Addr) []PortRule {
	v := p.Name(name)
	if SpecialUse(addr) || !v.Allowed && !v.Audit {
		return nil
	}
	s := steps{}
	private := PrivateAddr(addr)
	for _, n := range p.matching(name) {
		if n.Deny || private && !n.AllowPrivate {
			continue
		}
		s.add(PortRule{Rule: n.Rule}, inRails(p.Rails[:n.Within], name, addr, n.Ports))
	}
	if p.Mode == ModeAudit {
		rails := p.Rails[:p.AuditIn]
		byName := inRails(rails, name, addr, everyPort())
		byAddr := inRails(rails, "", addr, everyPort()) // the entries have steps for these
		s.add(PortRule{Audit: true, Rule: NoRule}, subtractPorts(byName, byAddr))
	}
	return s.steps
}

// MergeSteps joins what several names give at one address. The order of the
// lists does not matter. More than MaxLearnedSteps steps are an error: then
// the address must not be learned.
func MergeSteps(lists ...[]PortRule) ([]PortRule, error) {
	all := slices.Concat(lists...)
	slices.SortStableFunc(all, func(a, b PortRule) int {
		return cmp.Or(cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Lo, b.Lo), cmp.Compare(b.Hi, a.Hi))
	}) // NoRule is the last
	s := steps{}
	for _, step := range all {
		s.add(step, []PortRange{{step.Lo, step.Hi, step.Proto}})
	}
	if n := len(s.steps); n > MaxLearnedSteps {
		return nil, fmt.Errorf("the names of an address take %d port ranges to decide, at most %d fit: join port ranges or rules", n, MaxLearnedSteps)
	}
	return s.steps, nil
}

// WithPublished adds published ports of the sandbox to a program, each under a
// rule of tenant that is named after it. Ports are single TCP or UDP ports.
func WithPublished(p Program, tenant string, ports []PortRange) (Program, error) {
	if len(ports) > MaxPublished {
		return Program{}, fmt.Errorf("%d ports are to be published, at most %d are allowed", len(ports), MaxPublished)
	}
	p.Rules, p.Published = slices.Clone(p.Rules), slices.Clone(p.Published)
	for _, r := range ports {
		if r.Lo != r.Hi || r.Lo == 0 || r.Proto != TCP && r.Proto != UDP {
			return Program{}, fmt.Errorf("publish %s: must be one port of tcp or udp", r)
		}
		id := uint16(len(p.Rules))
		pub := Published{Port: r.Lo, Proto: r.Proto, Rule: id}
		if slices.ContainsFunc(p.Published, func(o Published) bool { return o.Port == pub.Port && o.Proto == pub.Proto }) {
			return Program{}, fmt.Errorf("publish %s: is published twice", r)
		}
		p.Published = append(p.Published, pub)
		p.Rules = append(p.Rules, RuleRef{ID: id, Tenant: tenant, Name: "published:" + r.String(), Action: Allow})
	}
	p.Digest = p.digest()
	return p, nil
}
