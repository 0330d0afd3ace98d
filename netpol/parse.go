// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Kind is what the kind key of a policy file says.
const Kind = "EgressPolicy"

// policyKeys are the keys of a policy, in the order in which people write them.
var policyKeys = []string{"name", "rules", "guardrail", "mode", "rate", "budget"}

// Parse reads an EgressPolicy file. Every fault is an *Error with file and
// line; several are joined.
func Parse(file string, data []byte) (Policy, error) {
	d, err := ReadDocument(file, data)
	if err != nil {
		return Policy{}, err
	}
	if d.Kind(d.Root, Kind) == "" {
		return Policy{}, d.Err() // everything else would be noise
	}
	p := d.policy(d.Root, append([]string{"kind"}, policyKeys...)...)
	if err := d.Err(); err != nil {
		return Policy{}, err
	}
	return p, nil
}

// Policy reads a policy that stands inside another document, without a kind.
func (d *Document) Policy(n *yaml.Node) Policy {
	return d.policy(n, policyKeys...)
}

func (d *Document) policy(n *yaml.Node, known ...string) Policy {
	p := Policy{Source: d.file}
	f := d.Fields(n, "policy", known...)
	if n.Kind != yaml.MappingNode {
		return p
	}
	p.Name = d.name(n, f, "policy")
	if f["rules"] == nil {
		d.Errorf(n, `policy has no rules: write "rules: []" to allow nothing`)
	} else if items, ok := d.List(f["rules"], "rules"); ok {
		p.Rules = d.rules(items)
	}
	if f["guardrail"] != nil {
		p.Guardrail = d.guardrail(f["guardrail"])
	}
	if f["mode"] != nil {
		p.Mode = d.mode(f["mode"])
	}
	if f["rate"] != nil {
		p.Rates = d.rates(f["rate"])
	}
	if f["budget"] != nil {
		p.Budgets = d.budgets(f["budget"])
	}
	return p
}

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)

// name reads the name key of n.
func (d *Document) name(n *yaml.Node, f Fields, what string) string {
	if f["name"] == nil {
		d.Errorf(n, "%s has no name", what)
		return ""
	}
	name, ok := d.Text(f["name"], "name of "+what)
	if ok && !nameForm.MatchString(name) {
		d.Errorf(f["name"], "name %q of %s: use 1 to 63 of a-z, 0-9, '.', '_' and '-', with a letter or a digit at both ends", clip(name), what)
		return ""
	}
	return name
}

// mode answers ModeEnforce for anything that is not audit.
func (d *Document) mode(n *yaml.Node) Mode {
	mode, ok := d.Text(n, "mode")
	switch {
	case !ok, mode == "enforce":
	case mode == "audit":
		return ModeAudit
	default:
		d.Errorf(n, "unknown mode %q%s", clip(mode), Suggest(mode, []string{"enforce", "audit"}))
	}
	return ModeEnforce
}

func (d *Document) rules(items []*yaml.Node) []Rule {
	if len(items) > MaxRules {
		d.Errorf(items[MaxRules], "policy has %d rules, at most %d are allowed", len(items), MaxRules)
		return nil
	}
	var rules []Rule
	firstLine := map[string]int{}
	for i, n := range items {
		what := fmt.Sprintf("rule %d", i+1)
		if name := peekName(n); name != "" {
			what = fmt.Sprintf("rule %q", clip(name))
		}
		r := d.rule(n, what)
		if first := firstLine[r.Name]; r.Name != "" && first != 0 {
			d.Errorf(n, "%s is defined twice, first on line %d: every rule needs a name of its own", what, first)
		} else {
			firstLine[r.Name] = n.Line
		}
		rules = append(rules, r)
	}
	return rules
}

// peekName finds the name of a rule, to be used in messages about it.
func peekName(n *yaml.Node) string {
	if n.Kind != yaml.MappingNode {
		return ""
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == "name" && n.Content[i+1].Kind == yaml.ScalarNode {
			return n.Content[i+1].Value
		}
	}
	return ""
}

func (d *Document) rule(n *yaml.Node, what string) Rule {
	r := Rule{Line: n.Line}
	f := d.Fields(n, what, "name", "action", "to", "ports", "rate")
	if n.Kind != yaml.MappingNode {
		return r
	}
	r.Name = d.name(n, f, what)
	r.Action = d.action(n, f, what)
	use := opens
	if r.Action == Deny {
		use = closes
	}
	r.To = d.targets(n, f, what, use)
	switch {
	case f["ports"] != nil && r.Action == Deny && hasName(r.To):
		d.Errorf(f["ports"], "ports of %s: a deny rule refuses the names of an fqdn whatever the port is, remove the ports or deny a cidr in a rule of its own", what)
	case f["ports"] != nil:
		r.Ports = d.ports(f["ports"], what)
	case r.Action == Deny:
		r.Ports = everyPort()
	default:
		d.Errorf(n, "%s has no ports: list them, as in [443/tcp], or write [any/tcp]", what)
	}
	switch {
	case f["rate"] == nil:
	case r.Action == Deny:
		d.Errorf(f["rate"], "rate of %s: a deny rule lets nothing pass that could have a rate, remove it", what)
	default:
		r.Rate = d.rate(f["rate"], "rate of "+what)
	}
	return r
}

// action is required: with a default, a deny rule that loses its action
// would turn into the allow rule that it was written to prevent.
func (d *Document) action(n *yaml.Node, f Fields, what string) Action {
	if f["action"] == nil {
		d.Errorf(n, `%s has no action: write "action: allow" or "action: deny"`, what)
		return Allow // the choice that checks most
	}
	action, ok := d.Text(f["action"], "action of "+what)
	switch {
	case !ok:
	case action == "allow":
	case action == "deny":
		return Deny
	default:
		d.Errorf(f["action"], "unknown action %q in %s%s", clip(action), what, Suggest(action, []string{"allow", "deny"}))
	}
	return Allow
}

func (d *Document) guardrail(n *yaml.Node) *Guardrail {
	g := &Guardrail{Line: n.Line}
	items, _ := d.List(n, "guardrail")
	if len(items) > MaxRules {
		d.Errorf(items[MaxRules], "guardrail has %d bounds, at most %d are allowed", len(items), MaxRules)
		return g
	}
	for i, n := range items {
		what := fmt.Sprintf("guardrail bound %d", i+1)
		f := d.Fields(n, what, "to", "ports")
		if n.Kind != yaml.MappingNode {
			continue
		}
		b := Bound{Line: n.Line, To: d.targets(n, f, what, bounds)}
		if f["ports"] != nil {
			b.Ports = d.ports(f["ports"], what)
		} else {
			d.Errorf(n, "%s has no ports: list them, as in [443/tcp], or write [any/tcp, any/udp]", what)
		}
		g.Bounds = append(g.Bounds, b)
	}
	return g
}

func (d *Document) except(n *yaml.Node, cidr netip.Prefix) []netip.Prefix {
	items, ok := d.List(n, "except")
	if ok && len(items) == 0 {
		d.Errorf(n, "except of %s is empty: list what is excepted or remove the key", cidr)
	}
	if len(items) > MaxTargets {
		d.Errorf(items[MaxTargets], "cidr %s has %d exceptions, at most %d are allowed", cidr, len(items), MaxTargets)
		return nil
	}
	var out []netip.Prefix
	seen := map[netip.Prefix]bool{}
	for _, item := range items {
		e, ok := d.prefix(item, "except")
		switch {
		case !ok:
			continue
		case e.Addr().Is4() != cidr.Addr().Is4():
			d.Errorf(item, "except %s is not of the same family as %s", e, cidr)
		case e == cidr || covers(e, cidr):
			d.Errorf(item, "except %s leaves nothing of %s", e, cidr)
		case !covers(cidr, e):
			d.Errorf(item, "except %s is outside %s", e, cidr)
		case seen[e]:
			d.Errorf(item, "except %s is listed twice", e)
		}
		seen[e] = true
		out = append(out, e)
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

// covers says whether a contains all of b.
func covers(a, b netip.Prefix) bool { return a.Bits() <= b.Bits() && a.Contains(b.Addr()) }

// prefix reads a CIDR in its only legal form: no host bits, no mapping.
func (d *Document) prefix(n *yaml.Node, what string) (netip.Prefix, bool) {
	s, ok := d.Text(n, what)
	if !ok {
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			d.Errorf(n, "%s %s has no prefix length: write %s/%d", what, a, a.Unmap(), a.Unmap().BitLen())
		} else {
			d.Errorf(n, "%s %q is not an address prefix: write one like 10.20.0.0/16 or 2001:db8::/32", what, clip(s))
		}
		return netip.Prefix{}, false
	}
	if why := badPrefix(p); why != "" {
		d.Errorf(n, "%s %s %s", what, clip(s), why)
		return netip.Prefix{}, false
	}
	return p, true
}

// badPrefix says why a prefix is not in the only legal form, or "".
func badPrefix(p netip.Prefix) string {
	switch {
	case !p.IsValid():
		return "is not a prefix"
	case p.Addr().Is4In6() && p.Bits() >= 96:
		v4 := netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		return fmt.Sprintf("is IPv4-mapped IPv6, which no packet carries: write %s", v4.Masked())
	case p != p.Masked():
		return fmt.Sprintf("has host bits set: write %s, or %s/%d for the one address", p.Masked(), p.Addr(), p.Addr().BitLen())
	}
	return ""
}

func (d *Document) ports(n *yaml.Node, what string) []PortRange {
	items, ok := d.List(n, "ports of "+what)
	if ok && len(items) == 0 {
		d.Errorf(n, "ports of %s is empty: list at least one, as in [443/tcp]", what)
	}
	var out []PortRange
	for _, item := range items {
		s, ok := d.Scalar(item, "port of "+what)
		if !ok {
			continue
		}
		r, err := parsePorts(s)
		if err != nil {
			d.Errorf(item, "port %q of %s: %v", clip(s), what, err)
			continue
		}
		out = append(out, r)
	}
	out = mergePorts(out)
	if len(out) > MaxPortRules {
		d.Errorf(n, "%s has %d separate port ranges, at most %d are allowed: join some", what, len(out), MaxPortRules)
	}
	return out
}

// parsePorts reads 443/tcp, 8000-8010/tcp, any/udp or echo/icmp.
func parsePorts(s string) (PortRange, error) {
	ports, proto, ok := strings.Cut(s, "/")
	if !ok {
		if _, err := strconv.ParseUint(ports, 10, 16); err == nil {
			return PortRange{}, fmt.Errorf("has no protocol, write %s/tcp or %s/udp", ports, ports)
		}
		return PortRange{}, fmt.Errorf("write one like 443/tcp, 8000-8010/tcp or any/udp")
	}
	var r PortRange
	switch proto {
	case "tcp":
		r.Proto = TCP
	case "udp":
		r.Proto = UDP
	case "icmp":
		if ports != "echo" {
			return PortRange{}, fmt.Errorf("of ICMP only echo requests can pass, write echo/icmp")
		}
		return echoPort, nil
	default:
		return PortRange{}, fmt.Errorf("unknown protocol %q%s", clip(proto), Suggest(proto, []string{"tcp", "udp", "icmp"}))
	}
	if ports == "any" {
		r.Lo, r.Hi = 1, 65535
		return r, nil
	}
	lo, hi, isRange := strings.Cut(ports, "-")
	if !isRange {
		hi = lo
	}
	var err error
	if r.Lo, err = parsePort(lo); err != nil {
		return PortRange{}, err
	}
	if r.Hi, err = parsePort(hi); err != nil {
		return PortRange{}, err
	}
	if r.Lo > r.Hi {
		return PortRange{}, fmt.Errorf("is backwards, write %d-%d/%s", r.Hi, r.Lo, proto)
	}
	return r, nil
}

func parsePort(s string) (uint16, error) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, fmt.Errorf("%q is not a port number, write a number, a range like 8000-8010, or any", clip(s))
	}
	if len(s) > 1 && s[0] == '0' {
		return 0, fmt.Errorf("%q has leading zeros", clip(s))
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("ports are 1 to 65535")
	}
	return uint16(n), nil
}
