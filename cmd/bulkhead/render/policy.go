// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/bulkheadhq/bulkhead/netpol"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
)

// Never stands where a rule has not been used.
const Never = "never"

// PolicyStatus writes the report of a policy in force. What is not as it should
// be comes first.
func PolicyStatus(w io.Writer, r *nodev1.PolicyStatusResponse) error {
	p := &page{w: w}
	p.pairs([][2]string{
		{"Sandbox", r.GetSandbox() + " (" + r.GetName() + " of " + r.GetTenant() + ")"},
		{"Enforced", enforcedLine(r)},
		{"Mode", modeLine(r.GetMode())},
		{"Revision", strconv.FormatUint(r.GetRevision(), 10) + ", digest " + short(r.GetDigest())},
		{"Published", orNothing(Published(r.GetPublished()))},
		{"Connections", connectionsLine(r.GetConnections())},
	})
	ruleTable(p, r.GetRules())
	p.list("Never used", unused(r.GetRules()))
	limitTables(p, r)
	nameTables(p, r)
	dropTable(p, r.GetDrops())
	auditTable(p, r.GetAudited())
	return p.err
}

func enforcedLine(r *nodev1.PolicyStatusResponse) string {
	verified := "not verified in the kernel yet"
	if r.GetVerifiedNs() != 0 {
		verified = "verified in the kernel at " + Time(r.GetVerifiedNs())
	}
	if r.GetDegraded() != "" {
		return "NO: " + r.GetDegraded() + " (last " + verified + ")"
	}
	return "yes, " + verified
}

func modeLine(mode string) string {
	if mode == "audit" {
		return "audit: some of what would be denied passes, and is recorded"
	}
	return mode
}

// short is enough of a digest to compare by eye.
func short(digest string) string { return digest[:min(len(digest), 16)] }

func orNothing(s string) string {
	if s == "" {
		return "nothing"
	}
	return s
}

// Published writes ports the way --publish reads them.
func Published(ports []*sandboxv1.PublishedPort) string {
	var out []string
	for _, p := range ports {
		out = append(out, fmt.Sprintf("%d:%d/%s", p.GetHost(), p.GetPort(), p.GetProtocol()))
	}
	return strings.Join(out, ", ")
}

func ruleTable(p *page, rules []*nodev1.RuleStatus) {
	if len(rules) == 0 {
		p.line("\nRules: none, so nothing may leave")
		return
	}
	var rows [][]string
	for _, r := range rules {
		last := Time(r.GetLastNs())
		if r.GetPackets() == 0 {
			last = Never
		}
		rows = append(rows, []string{r.GetTenant(), r.GetRule(), r.GetAction(), some(r.GetTo(), 2), portsCell(r),
			count(r.GetPackets()), bytesCell(r.GetBytes()), last, r.GetFile()})
	}
	p.table("Rules", []string{"TENANT", "RULE", "ACTION", "TO", "PORTS", "PACKETS", "BYTES", "LAST", "SET IN"}, rows)
}

// everyPort is what a deny rule without ports is.
const everyPort = "echo/icmp, any/tcp, any/udp"

func portsCell(r *nodev1.RuleStatus) string {
	s := some(r.GetPorts(), 3)
	if s == everyPort {
		s = "all"
	}
	if r.GetRateBits() != 0 {
		s += " at " + netpol.FormatRate(r.GetRateBits())
	}
	return s
}

// some is the first most of items, and how many more there are.
func some(items []string, most int) string {
	if len(items) <= most {
		return strings.Join(items, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(items[:most], ", "), len(items)-most)
}

// unused names allow rules that have let nothing through: candidates to go.
func unused(rules []*nodev1.RuleStatus) []string {
	var out []string
	for _, r := range rules {
		published := strings.HasPrefix(r.GetRule(), "published:") // no name that anybody can give a rule
		if r.GetPackets() == 0 && r.GetAction() == "allow" && !published {
			line := r.GetRule() + " of " + r.GetTenant()
			if r.GetFile() != "" {
				line += " (" + r.GetFile() + ")"
			}
			out = append(out, line)
		}
	}
	return out
}

func limitTables(p *page, r *nodev1.PolicyStatusResponse) {
	var rows [][]string
	for _, x := range r.GetRates() {
		rows = append(rows, []string{rateOwner(x), netpol.FormatRate(x.GetBits()), percent(x.GetFill())})
	}
	if len(rows) > 0 {
		p.table("Rates", []string{"OF", "RATE", "BURST IN USE"}, rows)
	}
	rows = nil
	for _, b := range r.GetBudgets() {
		rows = append(rows, []string{budgetOwner(b), Size(b.GetSpent()), Size(b.GetLimit()), b.GetPer(), budgetState(b)})
	}
	if len(rows) > 0 {
		p.table("Budgets", []string{"OF", "SPENT", "LIMIT", "PER", "STATE"}, rows)
	}
}

func nameTables(p *page, r *nodev1.PolicyStatusResponse) {
	var rows [][]string
	for _, n := range r.GetNames() {
		rows = append(rows, []string{n.GetName(), some(n.GetAddresses(), 4), strings.Join(n.GetRules(), ", "), Time(n.GetExpiresNs())})
	}
	if len(rows) > 0 {
		p.table("Names resolved", []string{"NAME", "ADDRESSES", "RULES", "UNTIL"}, rows)
	}
	rows = nil
	for _, o := range r.GetResolver().GetOutcomes() {
		rows = append(rows, []string{o.GetOutcome(), count(o.GetLookups())})
	}
	if len(rows) > 0 {
		p.table(fmt.Sprintf("Lookups (%s asked, %s answered)", Size(r.GetResolver().GetBytesIn()), Size(r.GetResolver().GetBytesOut())),
			[]string{"OUTCOME", "COUNT"}, rows)
	}
}

func dropTable(p *page, drops []*nodev1.DropCounter) {
	var rows [][]string
	for _, c := range drops {
		rows = append(rows, []string{c.GetReason(), count(c.GetPackets()), bytesCell(c.GetBytes())})
	}
	if len(rows) > 0 {
		p.table("Dropped", []string{"REASON", "PACKETS", "BYTES"}, rows)
	}
}

// maxAudited is how many flows a report shows; -o json has all.
const maxAudited = 20

func auditTable(p *page, flows []*nodev1.AuditedFlow) {
	var rows [][]string
	for _, f := range flows[:min(len(flows), maxAudited)] {
		would := "no rule"
		if f.GetRule() != "" {
			would = f.GetRule() + " of " + f.GetTenant()
		}
		port := f.GetProtocol()
		if port != "icmp" {
			port = fmt.Sprintf("%d/%s", f.GetPort(), f.GetProtocol())
		}
		rows = append(rows, []string{f.GetAddress(), port, strings.Join(f.GetNames(), ", "), would, count(f.GetPackets()), bytesCell(f.GetBytes())})
	}
	if len(rows) == 0 {
		return
	}
	title := "Let pass for audit"
	if n := len(flows) - maxAudited; n > 0 {
		title += fmt.Sprintf(" (and %d more, see -o json)", n)
	}
	p.table(title, []string{"ADDRESS", "PORT", "NAMES", "WOULD BE DENIED BY", "PACKETS", "BYTES"}, rows)
}

// Lines is a text of several lines that somebody else wrote, safe to show.
func Lines(text string) string {
	var b strings.Builder
	for l := range strings.Lines(text) {
		b.WriteString(Clean(strings.TrimRight(l, "\n")) + "\n")
	}
	return b.String()
}
