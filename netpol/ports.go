// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"cmp"
	"slices"
)

// mergePorts sorts ranges by protocol and port and joins those that overlap
// or touch.
func mergePorts(in []PortRange) []PortRange {
	in = slices.Clone(in)
	slices.SortFunc(in, func(a, b PortRange) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Lo, b.Lo), cmp.Compare(a.Hi, b.Hi))
	})
	var out []PortRange
	for _, r := range in {
		if n := len(out); n > 0 && out[n-1].Proto == r.Proto && int(r.Lo) <= int(out[n-1].Hi)+1 {
			out[n-1].Hi = max(out[n-1].Hi, r.Hi)
			continue
		}
		out = append(out, r)
	}
	return out
}

// intersectPorts answers the ports that are in both. Both are merged, and so
// is the answer.
func intersectPorts(a, b []PortRange) []PortRange {
	var out []PortRange
	for _, x := range a {
		for _, y := range b {
			if r, ok := intersectRange(x, y); ok {
				out = append(out, r)
			}
		}
	}
	return mergePorts(out)
}

func intersectRange(x, y PortRange) (PortRange, bool) {
	r := PortRange{max(x.Lo, y.Lo), min(x.Hi, y.Hi), x.Proto}
	return r, x.Proto == y.Proto && r.Lo <= r.Hi
}

// portsCover says whether r lies wholly in set, which is merged.
func portsCover(set []PortRange, r PortRange) bool {
	for _, s := range set {
		if s.Proto == r.Proto && s.Lo <= r.Lo && r.Hi <= s.Hi {
			return true
		}
	}
	return false
}

// subtractPorts answers the ports of a that are not in b. Both are merged, and
// so is the answer.
func subtractPorts(a, b []PortRange) []PortRange {
	var out []PortRange
	for _, x := range a {
		lo := int(x.Lo)
		for _, y := range b {
			r, ok := intersectRange(x, y)
			if !ok {
				continue
			}
			if lo < int(r.Lo) {
				out = append(out, PortRange{uint16(lo), r.Lo - 1, x.Proto})
			}
			lo = int(r.Hi) + 1
		}
		if lo <= int(x.Hi) {
			out = append(out, PortRange{uint16(lo), x.Hi, x.Proto})
		}
	}
	return out
}

// everyPort is all that a flow can be, and what a deny rule without ports
// denies. It is merged.
func everyPort() []PortRange {
	return []PortRange{echoPort, {0, 65535, TCP}, {0, 65535, UDP}}
}
