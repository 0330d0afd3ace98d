// SPDX-License-Identifier: Apache-2.0

// Package suggest writes an egress policy from what a sandbox was seen to
// send: what audit mode let pass, say.
//
// It proposes the narrowest rules that allow what was seen, and nothing that
// was not: whole names, single addresses and single ports. It never joins
// names into a pattern, addresses into a prefix or ports into a range; that is
// for a person to decide, who reads the result before using it.
package suggest

import (
	"bytes"
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/docker/go-units"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// Seen is traffic to one destination.
type Seen struct {
	Name    string     // that the sandbox resolved to Addr; "" if there was none
	Addr    netip.Addr // may be invalid if Name is set
	Port    uint16     // netpol.EchoPort of an ICMP echo request
	Proto   netpol.Proto
	Packets uint64
	Bytes   uint64
}

// group is what one rule will allow.
type group struct {
	name    string
	addr    netip.Addr // if name is ""
	private map[netip.Addr]bool
	ports   map[netpol.PortRange]uint64 // packets to each
	packets uint64
	bytes   uint64
}

// maxNever of what no rule can allow are listed.
const maxNever = 20

// Policy writes a policy of that name, with a rule for each name in order of
// names, then one for each address that no name led to. What no rule can allow
// is listed in comments. The result is read by netpol.Parse without errors,
// unless name cannot be the name of a policy.
func Policy(name string, seen []Seen) []byte {
	groups, never := collect(seen)
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Proposed from what was seen. Read it before you use it: what is here\n# because of an attack would be allowed, too.\n")
	for _, n := range never[:min(len(never), maxNever)] {
		fmt.Fprintf(&b, "# not proposed: %s\n", n)
	}
	if n := len(never) - maxNever; n > 0 {
		fmt.Fprintf(&b, "# not proposed: %d more\n", n)
	}
	fmt.Fprintf(&b, "kind: %s\nname: %q\n", netpol.Kind, name)
	if len(groups) == 0 {
		b.WriteString("rules: [] # nothing was seen that a rule could allow\n")
		return b.Bytes()
	}
	b.WriteString("rules:\n")
	used := map[string]bool{}
	for i, g := range groups {
		if i == netpol.MaxRules {
			fmt.Fprintf(&b, "# %d more destinations were seen, more than a policy may have rules\n", len(groups)-i)
			break
		}
		g.write(&b, used)
	}
	return b.Bytes()
}

// collect sorts what was seen into groups and finds what no rule can allow.
func collect(seen []Seen) (groups []*group, never []string) {
	byKey := map[string]*group{}
	for _, s := range seen {
		port := netpol.PortRange{Lo: s.Port, Hi: s.Port, Proto: s.Proto}
		name, why := check(s, port)
		if why != "" {
			to := s.Addr.String()
			if s.Name != "" {
				to = fmt.Sprintf("%.100q", s.Name)
			}
			never = append(never, fmt.Sprintf("%s at %s: %s", to, port, why))
			continue
		}
		key := name
		if name == "" {
			key = s.Addr.String()
		}
		g := byKey[key]
		if g == nil {
			g = &group{name: name, private: map[netip.Addr]bool{}, ports: map[netpol.PortRange]uint64{}}
			if name == "" {
				g.addr = s.Addr
			}
			byKey[key] = g
			groups = append(groups, g)
		}
		g.ports[port] += s.Packets
		g.packets += s.Packets
		g.bytes += s.Bytes
		if name != "" && s.Addr.IsValid() && netpol.PrivateAddr(s.Addr) {
			g.private[s.Addr] = true
		}
	}
	slices.SortFunc(groups, func(a, b *group) int {
		return cmp.Or(cmp.Compare(order(a), order(b)), strings.Compare(a.name, b.name), a.addr.Compare(b.addr))
	})
	slices.Sort(never)
	return groups, slices.Compact(never)
}

// order puts names before addresses.
func order(g *group) int {
	if g.name != "" {
		return 0
	}
	return 1
}

// check answers the name in its legal form, "" if an address stands for
// itself, and why no rule can allow what was seen.
func check(s Seen, port netpol.PortRange) (name, why string) {
	switch {
	case s.Proto == netpol.ICMP && s.Port == netpol.EchoPort:
	case s.Proto != netpol.TCP && s.Proto != netpol.UDP, s.Port == 0:
		return "", fmt.Sprintf("no rule can name %s", port)
	}
	if s.Name != "" {
		name, err := netpol.ParsePattern(s.Name)
		switch {
		case err != nil:
			return "", "the name " + err.Error()
		case strings.Contains(name, "*"):
			return "", "is not a name"
		case s.Addr.IsValid() && netpol.SpecialUse(s.Addr):
			return "", "no name may lead to " + s.Addr.String()
		}
		return name, ""
	}
	if !s.Addr.IsValid() || s.Addr.Zone() != "" || s.Addr.Is4In6() || hardDenied(s.Addr) {
		return "", "no rule can open it"
	}
	return "", ""
}

func hardDenied(a netip.Addr) bool {
	return slices.ContainsFunc(netpol.HardDenied(), func(h netpol.HardDeny) bool { return h.Prefix.Contains(a) })
}

var notInNames = regexp.MustCompile(`[^a-z0-9._-]+`)

// ruleName makes a name that no other rule has.
func (g *group) ruleName(used map[string]bool) string {
	base := g.name
	if base == "" {
		base = g.addr.StringExpanded()
	}
	base = strings.Trim(notInNames.ReplaceAllString(base, "-"), "._-")
	base = strings.TrimRight(base[:min(len(base), 55)], "._-")
	if base == "" {
		base = "rule"
	}
	name := base
	for i := 2; used[name]; i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	used[name] = true
	return name
}

func (g *group) write(b *bytes.Buffer, used map[string]bool) {
	fmt.Fprintf(b, "# %d packets, %s\n", g.packets, units.BytesSize(float64(g.bytes)))
	target := fmt.Sprintf("{fqdn: %q}", g.name)
	switch {
	case g.name == "":
		target = fmt.Sprintf("{cidr: %q}", netip.PrefixFrom(g.addr, g.addr.BitLen()))
		b.WriteString("# no name led to this address\n")
	case len(g.private) > 0:
		target = fmt.Sprintf("{fqdn: %q, allow_private: true}", g.name)
		fmt.Fprintf(b, "# allow_private: it resolved to %s\n", some(g.private))
	}
	ports := g.mostUsed()
	if n := len(g.ports) - len(ports); n > 0 {
		fmt.Fprintf(b, "# %d more ports were seen, more than fit: these had the most packets\n", n)
	}
	list := make([]string, len(ports))
	for i, p := range ports {
		list[i] = p.String()
	}
	fmt.Fprintf(b, "- name: %q\n  action: allow\n  to: [%s]\n  ports: [%s]\n", g.ruleName(used), target, strings.Join(list, ", "))
}

// mostUsed answers the ports with the most packets, as many as the addresses
// of a name can have, in the order of ports.
func (g *group) mostUsed() []netpol.PortRange {
	byPort := func(a, b netpol.PortRange) int { return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Lo, b.Lo)) }
	var ports []netpol.PortRange
	for p := range g.ports {
		ports = append(ports, p)
	}
	slices.SortFunc(ports, func(a, b netpol.PortRange) int { return cmp.Or(cmp.Compare(g.ports[b], g.ports[a]), byPort(a, b)) })
	ports = ports[:min(len(ports), netpol.MaxLearnedSteps)]
	slices.SortFunc(ports, byPort)
	return ports
}

// some lists up to three addresses.
func some(set map[netip.Addr]bool) string {
	var addrs []netip.Addr
	for a := range set {
		addrs = append(addrs, a)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	var list []string
	for _, a := range addrs[:min(len(addrs), 3)] {
		list = append(list, a.String())
	}
	if n := len(addrs) - 3; n > 0 {
		list = append(list, fmt.Sprintf("%d more", n))
	}
	return strings.Join(list, ", ")
}
