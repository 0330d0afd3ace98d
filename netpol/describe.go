// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// Describe lists the effective rules, one a line, for people. A line about a
// prefix holds for the addresses that no longer prefix names, one about a name
// for what it resolves to, and what no line allows is denied.
func (p Program) Describe() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, e := range p.Entries {
		p.describeEntry(w, e)
	}
	for _, n := range p.Names {
		p.describeName(w, n)
	}
	for _, pub := range p.Published {
		port := PortRange{pub.Port, pub.Port, pub.Proto}
		fmt.Fprintf(w, "allow\tanswers\t%s\t%s\n", port, p.ruleText(pub.Rule))
	}
	rest := "everything else"
	if len(p.Entries)+len(p.Names) == 0 {
		rest = "everything"
	}
	fmt.Fprintf(w, "deny\t%s\tall\tno rule\n", rest)
	for _, r := range p.Rates {
		fmt.Fprintf(w, "rate\t%s\t%s\tset by %s\n", whose(r.Scope, r.Tenant), FormatRate(r.Bits), r.Tenant)
	}
	for _, r := range p.Budgets {
		fmt.Fprintf(w, "budget\t%s\t%s per %s\tset by %s\n", whose(r.Scope, r.Tenant), FormatSize(r.Bytes), r.Per, r.Tenant)
	}
	if p.Mode == ModeAudit {
		fmt.Fprintf(w, "mode\taudit\t\twhat says audit passes and is recorded%s\n", inside(p.Rails[:p.AuditIn]))
	}
	_ = w.Flush() // a strings.Builder takes everything
	return b.String()
}

func (p Program) describeEntry(w io.Writer, e Entry) {
	if len(e.Ports) == 0 {
		fmt.Fprintf(w, "deny\t%s\tall\tno rule\n", e.Prefix)
	}
	same := func(a, b PortRule) bool { return a.Rule == b.Rule && a.Deny == b.Deny && a.Audit == b.Audit }
	for i := 0; i < len(e.Ports); {
		first := e.Ports[i]
		var ports []PortRange
		for ; i < len(e.Ports) && same(first, e.Ports[i]); i++ {
			ports = append(ports, PortRange{e.Ports[i].Lo, e.Ports[i].Hi, e.Ports[i].Proto})
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", verb(first.Deny, first.Audit), e.Prefix, joinPorts(ports), p.ruleText(first.Rule))
	}
}

func (p Program) describeName(w io.Writer, n NameRule) {
	ports := "all"
	if !n.Deny {
		ports = joinPorts(n.Ports)
	}
	private := ""
	if n.AllowPrivate {
		private = ", private addresses too"
	}
	fmt.Fprintf(w, "%s\t%s\t%s\t%s%s%s\n", verb(n.Deny, n.Audit), n.Pattern, ports, p.ruleText(n.Rule), private, inside(p.Rails[:n.Within]))
}

func verb(deny, audit bool) string {
	switch {
	case audit:
		return "audit"
	case deny:
		return "deny"
	}
	return "allow"
}

func (p Program) ruleText(rule uint16) string {
	if rule == NoRule {
		return "no rule"
	}
	ref := p.Rules[rule]
	s := fmt.Sprintf("rule %s of %s", ref.Name, ref.Tenant)
	if ref.Rate != 0 {
		s += ", at most " + FormatRate(ref.Rate)
	}
	return s
}

func whose(s Scope, tenant string) string {
	if s == ScopeTenant {
		return "all of " + tenant
	}
	return "each sandbox"
}

// inside names the guardrails that a line is cut down to.
func inside(rails []Rail) string {
	if len(rails) == 0 {
		return ""
	}
	tenants := make([]string, len(rails))
	for i, r := range rails {
		tenants[i] = r.Tenant
	}
	return ", inside the guardrail of " + strings.Join(tenants, ", ")
}
