// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"net/netip"
	"sync/atomic"
	"time"
)

// Outcomes of an Event.
const (
	OutcomeAnswered  = "answered"  // released; no addresses: there are none
	OutcomeAudit     = "audit"     // released, and would be refused if the policy were enforced
	OutcomeDenied    = "rule_deny" // a deny rule refuses the name
	OutcomeNoRule    = "no_rule"   // no rule allows the name
	OutcomeType      = "type"      // records of this type are not answered
	OutcomeName      = "name"      // too long, too many labels, odd characters
	OutcomeRate      = "rate"      // queries a second
	OutcomeTunnel    = "tunnel"    // different names under a wildcard, or a long label
	OutcomeUpstream  = "upstream"  // no upstream gave a usable answer
	OutcomeStripped  = "stripped"  // no address was left to release
	OutcomeLearn     = "learn"     // journal or kernel did not take the addresses
	OutcomeEvicted   = "evicted"   // leases that gave way to newer ones
	OutcomeMalformed = "malformed" // not a query
	OutcomePanic     = "panic"     // a fault of ours; not answered
)

// Event is something that happened to a query or to a lease.
type Event struct {
	ID         string
	Time       time.Time
	Name       string // lower case, no final dot
	Type       string // A, AAAA, ...
	Outcome    string
	Rule       int // index in Program.Rules; -1 if none
	Addrs      []netip.Addr
	Detail     string
	Suppressed uint64 // events of this sandbox left out since the one before
}

// Stats counts queries of a sandbox by what became of them, and bytes of DNS
// messages, without headers below.
type Stats struct {
	Queries   uint64
	Answered  uint64
	Audited   uint64
	Denied    uint64 // by a deny rule
	NoRule    uint64
	Type      uint64
	Name      uint64
	Rate      uint64
	Tunnel    uint64
	Malformed uint64
	Upstream  uint64 // no upstream gave a usable answer
	Stripped  uint64 // no address was left to release
	Learn     uint64 // journal or kernel did not take the addresses
	Dropped   uint64 // more in flight than allowed, not answered
	Panics    uint64 // faults of ours, not answered

	StrippedAddrs    uint64 // addresses taken out of answers
	Evicted          uint64 // leases that gave way to newer ones
	Expired          uint64 // leases that ended
	Spoofed          uint64 // messages that came back to our sockets and were no answer
	EventsSuppressed uint64

	ClientBytesIn    uint64
	ClientBytesOut   uint64
	UpstreamBytesIn  uint64
	UpstreamBytesOut uint64
}

// counters of one sandbox, and what else the upstreams must know of it.
type counters struct {
	queries, answered, audited, denied, noRule, qtype, name, rate, tunnel, malformed,
	upstream, stripped, learn, dropped, panics,
	strippedAddrs, evicted, expired, spoofed, suppressed,
	clientIn, clientOut, upstreamIn, upstreamOut atomic.Uint64

	asking atomic.Int64 // queries under way to the upstreams
	prefer preference
}

func (c *counters) stats() Stats {
	return Stats{
		Queries: c.queries.Load(), Answered: c.answered.Load(), Audited: c.audited.Load(),
		Denied: c.denied.Load(), NoRule: c.noRule.Load(), Type: c.qtype.Load(), Name: c.name.Load(),
		Rate: c.rate.Load(), Tunnel: c.tunnel.Load(), Malformed: c.malformed.Load(),
		Upstream: c.upstream.Load(), Stripped: c.stripped.Load(), Learn: c.learn.Load(), Dropped: c.dropped.Load(), Panics: c.panics.Load(),
		StrippedAddrs: c.strippedAddrs.Load(), Evicted: c.evicted.Load(), Expired: c.expired.Load(),
		Spoofed: c.spoofed.Load(), EventsSuppressed: c.suppressed.Load(),
		ClientBytesIn: c.clientIn.Load(), ClientBytesOut: c.clientOut.Load(),
		UpstreamBytesIn: c.upstreamIn.Load(), UpstreamBytesOut: c.upstreamOut.Load(),
	}
}

// of is the counter of an outcome that ends a query.
func (c *counters) of(outcome string) *atomic.Uint64 {
	switch outcome {
	case OutcomeAnswered:
		return &c.answered
	case OutcomeAudit:
		return &c.audited
	case OutcomeDenied:
		return &c.denied
	case OutcomeNoRule:
		return &c.noRule
	case OutcomeType:
		return &c.qtype
	case OutcomeName:
		return &c.name
	case OutcomeRate:
		return &c.rate
	case OutcomeTunnel:
		return &c.tunnel
	case OutcomeUpstream:
		return &c.upstream
	case OutcomeStripped:
		return &c.stripped
	case OutcomeLearn:
		return &c.learn
	}
	return &c.malformed
}
