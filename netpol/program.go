// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strings"
	"text/tabwriter"
)

// Evaluate is the program's decision about a flow. It works on the entries as
// the datapath does, and knows nothing of hard denies.
func (p Program) Evaluate(f Flow) Verdict {
	best := -1
	for i, e := range p.Entries {
		if e.Prefix.Contains(f.Dst) && (best < 0 || e.Prefix.Bits() > p.Entries[best].Prefix.Bits()) {
			best = i
		}
	}
	if best >= 0 {
		for _, r := range p.Entries[best].Ports {
			if r.Proto == f.Proto && r.Lo <= f.Port && f.Port <= r.Hi {
				return verdict(!r.Deny, int(r.Rule))
			}
		}
	}
	return Verdict{Reason: ReasonNoRule, Rule: -1}
}

func verdict(allowed bool, rule int) Verdict {
	if allowed {
		return Verdict{Allowed: true, Reason: ReasonAllowed, Rule: rule}
	}
	return Verdict{Reason: ReasonDenied, Rule: rule}
}

// ReferenceEvaluate decides a flow straight from the layers, by the words of
// the package documentation and without Compile. It is what Compile is tested
// against. Rule counts the rules of all layers in order, as Compile does.
func ReferenceEvaluate(layers []Layer, f Flow) Verdict {
	id := 0
	allowed := -1
	inRails := true // inside the guardrail of every layer so far
	for _, l := range layers {
		for _, r := range l.Policy.Rules {
			if inTargets(r.To, f) && inPorts(r, f) {
				if r.Action == Deny {
					return verdict(false, id)
				}
				if allowed < 0 && inRails {
					allowed = id
				}
			}
			id++
		}
		if g := l.Policy.Guardrail; g != nil {
			in := false
			for _, b := range g.Bounds {
				in = in || inTargets(b.To, f) && inRanges(b.Ports, f)
			}
			inRails = inRails && in
		}
	}
	if allowed >= 0 {
		return verdict(true, allowed)
	}
	return Verdict{Reason: ReasonNoRule, Rule: -1}
}

func inTargets(to []Target, f Flow) bool {
	for _, t := range to {
		in := t.CIDR.Contains(f.Dst)
		for _, e := range t.Except {
			in = in && !e.Contains(f.Dst)
		}
		if in {
			return true
		}
	}
	return false
}

func inPorts(r Rule, f Flow) bool {
	if r.Action == Deny && len(r.Ports) == 0 {
		return f.Proto == TCP || f.Proto == UDP
	}
	return inRanges(r.Ports, f)
}

func inRanges(ports []PortRange, f Flow) bool {
	for _, p := range ports {
		if p.Proto == f.Proto && p.Lo <= f.Port && f.Port <= p.Hi {
			return true
		}
	}
	return false
}

// Describe lists the effective rules, one a line, for people. A line about a
// prefix holds for the addresses that no longer prefix names, and what no
// line allows is denied.
func (p Program) Describe() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, e := range p.Entries {
		if len(e.Ports) == 0 {
			fmt.Fprintf(w, "deny\t%s\tall\tno rule\n", e.Prefix)
		}
		for i := 0; i < len(e.Ports); {
			first := e.Ports[i]
			var ports []PortRange
			for ; i < len(e.Ports) && e.Ports[i].Rule == first.Rule; i++ {
				ports = append(ports, PortRange{e.Ports[i].Lo, e.Ports[i].Hi, e.Ports[i].Proto})
			}
			ref := p.Rules[first.Rule]
			fmt.Fprintf(w, "%s\t%s\t%s\trule %s of %s\n", ref.Action, e.Prefix, joinPorts(ports), ref.Name, ref.Tenant)
		}
	}
	rest := "everything else"
	if len(p.Entries) == 0 {
		rest = "everything"
	}
	fmt.Fprintf(w, "deny\t%s\tall\tno rule\n", rest)
	_ = w.Flush() // a strings.Builder takes everything
	return b.String()
}

// digest hashes what the program decides and counts. The layout is part of
// the promise that digests can be compared across versions of the agent:
// change the first line with it.
func (p Program) digest() [32]byte {
	b := []byte("bulkhead netpol program 1\n")
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
	b = binary.BigEndian.AppendUint32(b, uint32(len(p.Rules)))
	for _, r := range p.Rules {
		text(r.Tenant)
		text(r.Name)
		b = append(b, byte(r.Action))
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(p.Entries)))
	for _, e := range p.Entries {
		text(e.Prefix.String())
		b = binary.BigEndian.AppendUint32(b, uint32(len(e.Ports)))
		for _, r := range e.Ports {
			b = binary.BigEndian.AppendUint16(b, r.Lo)
			b = binary.BigEndian.AppendUint16(b, r.Hi)
			b = append(b, byte(r.Proto))
			flag(r.Deny)
			b = binary.BigEndian.AppendUint16(b, r.Rule)
		}
	}
	return sha256.Sum256(b)
}
