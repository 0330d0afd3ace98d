// SPDX-License-Identifier: Apache-2.0

package render

import (
	"net"
	"strconv"
	"strings"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// Verdict is the answer of explain on one line.
func Verdict(q *nodev1.ExplainRequest, r *nodev1.ExplainResponse) string {
	target := q.GetAddress()
	if q.GetPort() != 0 {
		target = net.JoinHostPort(target, strconv.FormatUint(uint64(q.GetPort()), 10))
	}
	line := "DENY "
	if r.GetAllowed() {
		line = "ALLOW "
	}
	line += q.GetProtocol() + " " + target
	switch {
	case r.GetRule() != "":
		line += "  rule " + r.GetRule() + " of " + orUnknown(r.GetTenant())
		if !r.GetAllowed() && r.GetDetail() != "" {
			line += ": " + r.GetDetail()
		}
	default:
		why := r.GetDetail()
		if why == "" {
			why = strings.ReplaceAll(r.GetReason(), "_", " ")
		}
		line += "  " + why
		if r.GetTenant() != "" {
			line += " (set by " + r.GetTenant() + ")"
		}
	}
	return Clean(strings.TrimRight(line, " "))
}
