// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"crypto/sha256"
	"encoding/binary"
)

// Evaluate is the program's decision about a flow to an address that names
// were resolved to. It works on the entries and the learned steps as the
// datapath does, and knows nothing of hard denies, limits and published ports.
// Names whose steps do not fit together give none.
func (p Program) Evaluate(f Flow, names ...string) Verdict {
	best := -1
	for i, e := range p.Entries {
		if e.Prefix.Contains(f.Dst) && (best < 0 || e.Prefix.Bits() > p.Entries[best].Prefix.Bits()) {
			best = i
		}
	}
	v := Verdict{Reason: ReasonNoRule, Rule: -1}
	if best >= 0 {
		if step, ok := firstStep(p.Entries[best].Ports, f); ok {
			if v = step.verdict(); step.Rule != NoRule {
				return v
			}
		}
	}
	lists := make([][]PortRule, len(names))
	for i, name := range names {
		lists[i] = p.Learn(name, f.Dst)
	}
	learned, err := MergeSteps(lists...)
	if err != nil {
		return v
	}
	if step, ok := firstStep(learned, f); ok {
		return step.verdict()
	}
	return v
}

func firstStep(steps []PortRule, f Flow) (PortRule, bool) {
	for _, s := range steps {
		if s.Proto == f.Proto && s.Lo <= f.Port && f.Port <= s.Hi {
			return s, true
		}
	}
	return PortRule{}, false
}

func (s PortRule) verdict() Verdict {
	switch {
	case s.Audit && s.Deny:
		return Verdict{Allowed: true, Reason: ReasonAllowed, Rule: int(s.Rule), Audit: ReasonDenied}
	case s.Audit:
		return Verdict{Allowed: true, Reason: ReasonAllowed, Rule: -1, Audit: ReasonNoRule}
	case s.Deny:
		return Verdict{Reason: ReasonDenied, Rule: int(s.Rule)}
	}
	return Verdict{Allowed: true, Reason: ReasonAllowed, Rule: int(s.Rule)}
}

// digest hashes what the program decides and counts. The layout is part of
// the promise that digests can be compared across versions of the agent:
// change the first line with it.
func (p Program) digest() [32]byte {
	b := []byte("bulkhead netpol program 2\n")
	text := func(s string) {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	flag := func(v bool) {
		if v {
			b = append(b, 1)
		} else {
			b = append(b, 0)
		}
	}
	count := func(n int) { b = binary.BigEndian.AppendUint32(b, uint32(n)) }
	number := func(n uint64) { b = binary.BigEndian.AppendUint64(b, n) }
	ports := func(list []PortRange) {
		count(len(list))
		for _, r := range list {
			b = binary.BigEndian.AppendUint16(b, r.Lo)
			b = binary.BigEndian.AppendUint16(b, r.Hi)
			b = append(b, byte(r.Proto))
		}
	}
	count(len(p.Rules))
	for _, r := range p.Rules {
		text(r.Tenant)
		text(r.Name)
		b = append(b, byte(r.Action))
		number(r.Rate)
	}
	count(len(p.Entries))
	for _, e := range p.Entries {
		text(e.Prefix.String())
		count(len(e.Ports))
		for _, r := range e.Ports {
			b = binary.BigEndian.AppendUint16(b, r.Lo)
			b = binary.BigEndian.AppendUint16(b, r.Hi)
			b = append(b, byte(r.Proto))
			flag(r.Deny)
			flag(r.Audit)
			b = binary.BigEndian.AppendUint16(b, r.Rule)
		}
	}
	count(len(p.Names))
	for _, n := range p.Names {
		text(n.Pattern)
		b = binary.BigEndian.AppendUint16(b, n.Rule)
		flag(n.Deny)
		flag(n.Audit)
		flag(n.AllowPrivate)
		ports(n.Ports)
		count(n.Within)
	}
	count(len(p.Rails))
	for _, rail := range p.Rails {
		text(rail.Tenant)
		count(len(rail.Bounds))
		for _, bound := range rail.Bounds {
			count(len(bound.To))
			for _, t := range bound.To {
				text(t.String())
				flag(t.AllowPrivate)
				count(len(t.Except))
				for _, e := range t.Except {
					text(e.String())
				}
			}
			ports(bound.Ports)
		}
	}
	b = append(b, byte(p.Mode))
	count(p.AuditIn)
	count(len(p.Rates))
	for _, r := range p.Rates {
		text(r.Tenant)
		b = append(b, byte(r.Scope))
		number(r.Bits)
	}
	count(len(p.Budgets))
	for _, r := range p.Budgets {
		text(r.Tenant)
		b = append(b, byte(r.Scope), byte(r.Per))
		number(r.Bytes)
	}
	count(len(p.Published))
	for _, r := range p.Published {
		b = binary.BigEndian.AppendUint16(b, r.Port)
		b = append(b, byte(r.Proto))
		b = binary.BigEndian.AppendUint16(b, r.Rule)
	}
	return sha256.Sum256(b)
}
