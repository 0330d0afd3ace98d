// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// flowWidths of the columns of a flow log, whose lines come one by one.
var flowWidths = []int{20, 7, 8, 48, 34, 9}

// FlowHeader heads the lines of Flow.
func FlowHeader() string {
	return columns("TIME", "VERDICT", "WHAT", "PEER", "WHY", "PACKETS", "BYTES")
}

// Flow is one entry of a flow log on a line.
func Flow(m *nodev1.FlowsResponse) string {
	switch e := m.GetEntry().(type) {
	case *nodev1.FlowsResponse_Flow:
		return flowLine(e.Flow)
	case *nodev1.FlowsResponse_Lookup:
		return lookupLine(e.Lookup)
	case *nodev1.FlowsResponse_Missed:
		return fmt.Sprintf("(%d entries are missing here: they came faster than they were read)\n", e.Missed.GetEntries())
	}
	return ""
}

func flowLine(f *nodev1.Flow) string {
	what := f.GetProtocol()
	if what == "" {
		what = "frame"
	}
	peer := f.GetAddress()
	if peer != "" && f.GetPort() != 0 {
		peer = net.JoinHostPort(peer, strconv.FormatUint(uint64(f.GetPort()), 10))
	}
	if f.GetInbound() {
		what += " in"
		if f.GetLocalPort() != 0 {
			peer += fmt.Sprintf(" to port %d", f.GetLocalPort())
		}
	}
	if n := f.GetNames(); len(n) > 0 {
		peer += " (" + strings.Join(n, ", ") + ")"
	}
	return columns(Time(f.GetTimeNs()), f.GetVerdict(), what, peer, flowWhy(f.GetVerdict(), f.GetReason(), f.GetRule(), f.GetTenant()),
		count(f.GetPackets()), bytesCell(f.GetBytes()))
}

// flowWhy names the rule, and the reason where that is not simply a rule.
func flowWhy(verdict, reason, rule, tenant string) string {
	by := ""
	if rule != "" {
		by = rule + " of " + tenant
	}
	if verdict == "allow" && by != "" {
		return by
	}
	return strings.TrimSuffix(reason+", "+by, ", ")
}

func lookupLine(l *nodev1.Lookup) string {
	why := l.GetOutcome()
	if l.GetRule() != "" {
		why += ", " + l.GetRule() + " of " + l.GetTenant()
	}
	if l.GetDetail() != "" {
		why += ": " + l.GetDetail()
	}
	peer := l.GetName()
	if a := l.GetAddresses(); len(a) > 0 {
		peer += " = " + strings.Join(a, ", ")
	}
	left := ""
	if n := l.GetSuppressed(); n > 0 {
		left = fmt.Sprintf("%d more", n)
	}
	return columns(Time(l.GetTimeNs()), l.GetVerdict(), "dns "+l.GetType(), peer, why, left, "")
}

// columns pads cells to flowWidths; one that is longer moves the others.
func columns(cells ...string) string {
	var b strings.Builder
	for i, cell := range cells {
		if cell = Clean(cell); cell == "" {
			cell = None
		}
		if i < len(flowWidths) {
			cell = fmt.Sprintf("%-*s  ", flowWidths[i], cell)
		}
		b.WriteString(cell)
	}
	return b.String() + "\n"
}
