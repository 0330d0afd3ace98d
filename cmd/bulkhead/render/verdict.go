// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"github.com/bulkheadhq/bulkhead/netpol"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// Explanation is the answer of explain: the verdict on one line, and below it,
// indented, what stands behind it.
func Explanation(w io.Writer, q *nodev1.ExplainRequest, r *nodev1.ExplainResponse) error {
	target := q.GetAddress()
	if q.GetPort() != 0 {
		target = net.JoinHostPort(target, strconv.FormatUint(uint64(q.GetPort()), 10))
	}
	p := &page{w: w}
	p.line(Clean(word(r.GetAllowed()) + " " + q.GetProtocol() + " " + target + "  " + because(r)))
	if n := r.GetName(); n != nil {
		p.line("  name: " + Clean(nameLine(n)))
		for _, a := range r.GetAddresses() {
			p.line("  " + Clean(a.GetAddress()+": "+word(a.GetVerdict().GetAllowed())+"  "+because(a.GetVerdict())))
		}
		for _, a := range r.GetAddresses() {
			if a.GetVerdict().GetAllowed() { // the same limits for all that pass
				limitLines(p, a.GetVerdict())
				break
			}
		}
	}
	limitLines(p, r)
	return p.err
}

func word(allowed bool) string {
	if allowed {
		return "ALLOW"
	}
	return "DENY"
}

// because says whose rule or which reason decided.
func because(r *nodev1.ExplainResponse) string {
	var line string
	if r.GetRule() != "" {
		line = "rule " + r.GetRule() + " of " + orUnknown(r.GetTenant())
		open := r.GetName() != nil && len(r.GetAddresses()) == 0 // the detail says what is still to come
		if r.GetDetail() != "" && (open || !r.GetAllowed()) {
			line += ": " + r.GetDetail()
		}
	} else {
		if line = r.GetDetail(); line == "" {
			line = strings.ReplaceAll(r.GetReason(), "_", " ")
		}
		if r.GetTenant() != "" {
			line += " (set by " + r.GetTenant() + ")"
		}
	}
	if a := r.GetAudit(); a != "" {
		line += "; audit mode: it would be denied (" + strings.ReplaceAll(a, "_", " ") + ")"
	}
	return line
}

func nameLine(n *nodev1.NameVerdict) string {
	switch {
	case n.GetAllowed():
		line := "resolved, by rule " + strings.Join(n.GetRules(), ", ")
		if n.GetExpiresNs() != 0 {
			line += "; what was learned holds until " + Time(n.GetExpiresNs())
		}
		return line
	case n.GetAudit():
		return "resolved for audit alone"
	case n.GetRule() != "":
		return "refused, by rule " + n.GetRule() + " of " + n.GetTenant()
	}
	return "refused: no rule allows it"
}

// limitLines says what the packet would meet if it is allowed.
func limitLines(p *page, r *nodev1.ExplainResponse) {
	for _, x := range r.GetRates() {
		p.line("  rate: " + Clean(rateOwner(x)+": "+netpol.FormatRate(x.GetBits())+", "+percent(x.GetFill())+" of its burst in use"))
	}
	for _, x := range r.GetBudgets() {
		p.line("  budget: " + Clean(budgetLine(x)))
	}
	if c := r.GetConnections(); c != nil {
		p.line("  connections: " + connectionsLine(c))
	}
}

// rateOwner says whose traffic a bucket adds up.
func rateOwner(r *nodev1.RateState) string {
	switch {
	case r.GetRule() != "":
		return "rule " + r.GetRule() + " of " + r.GetTenant()
	case r.GetScope() == "tenant":
		return "all of " + r.GetTenant()
	}
	return "this sandbox, by " + r.GetTenant()
}

func budgetOwner(b *nodev1.BudgetState) string {
	if b.GetScope() == "tenant" {
		return "all of " + b.GetTenant()
	}
	return "this sandbox, by " + b.GetTenant()
}

func budgetLine(b *nodev1.BudgetState) string {
	line := fmt.Sprintf("%s: %s", budgetOwner(b), spentOf(b))
	if s := budgetState(b); s != "" {
		line += "; " + s
	}
	return line
}

func spentOf(b *nodev1.BudgetState) string {
	return Size(b.GetSpent()) + " of " + Size(b.GetLimit()) + " per " + b.GetPer() + " spent"
}

func budgetState(b *nodev1.BudgetState) string {
	switch {
	case b.GetUnknown():
		return "BLOCKED: not known to the kernel"
	case b.GetBlocked():
		return "BLOCKED until " + Time(b.GetEndsNs())
	case b.GetEndsNs() != 0:
		return "begins anew at " + Time(b.GetEndsNs())
	}
	return ""
}

func connectionsLine(c *nodev1.Connections) string {
	line := fmt.Sprintf("at most %d at once", c.GetLimit())
	if c.GetRefused() > 0 {
		line += fmt.Sprintf("; %d packets beyond it were dropped", c.GetRefused())
	}
	return line
}

func percent(f float64) string { return strconv.FormatFloat(100*f, 'f', 0, 64) + "%" }
