// SPDX-License-Identifier: Apache-2.0

// Package egress keeps the flow log of every sandbox: what its program and its
// resolver have told lately, who listens to it, and which names stand behind
// an address.
//
// The log lives in memory and is bounded, for each sandbox and in all; a
// restart of the agent begins a new one. Flow and DNS never wait for a reader:
// one that is too slow loses the oldest entries and is told how many. Nothing
// here decides or bills anything; the counters in the kernel do.
package egress

import (
	"net/netip"
	"time"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// FlowEvent is one entry of the kernel's flow log: the first packet of a
// sandbox, rule, reason and second.
type FlowEvent struct {
	ID           string
	Slot         uint32
	Time         time.Time
	Tenant, Rule string // "" if no rule decided
	Reason       string // netpol.ReasonAllowed, also if it is only let pass for audit
	Audit        string // reason that it would have been denied for; "" if it was not audited
	Inbound      bool   // towards the sandbox
	Proto        netpol.Proto
	Peer         netip.Addr // not valid if the packet was not understood so far
	LocalPort    uint16
	PeerPort     uint16
	Bytes        uint64 // L3 bytes of this packet, all segments
	// Of its counter, with this packet: of the rule if that let it pass or denied
	// it, else of the reason, whatever rule the packet was under.
	TotalPackets uint64
	TotalBytes   uint64
}

// DNSEvent is one lookup.
type DNSEvent struct {
	ID           string
	Time         time.Time
	Name, Type   string
	Outcome      string // the resolver's word
	Tenant, Rule string // "" if no rule decided
	Denied       bool   // refused, or nothing of the answer was left
	Audit        bool   // it would have been refused
	Addrs        []netip.Addr
	Detail       string
	Suppressed   uint64 // lookups of the sandbox that were left out before this one
}

// Verdicts.
const (
	Allow = "allow"
	Deny  = "deny"
	Audit = "audit"
)

// Flow is a FlowEvent as the log has it.
type Flow struct {
	FlowEvent
	Names   []string // that the sandbox has resolved to Peer
	Packets uint64   // since the entry before of the same sandbox, direction, rule and reason, this one included
	Bytes   uint64
}

// Entry is one entry of a log; exactly one of its fields is set. Nobody changes
// what they point to.
type Entry struct {
	Flow   *Flow
	Lookup *DNSEvent
}

// Verdict is what became of it.
func (e Entry) Verdict() string {
	var denied, audited bool
	if f := e.Flow; f != nil {
		denied, audited = f.Reason != netpol.ReasonAllowed, f.Audit != ""
	} else {
		denied, audited = e.Lookup.Denied, e.Lookup.Audit
	}
	switch {
	case denied:
		return Deny
	case audited:
		return Audit
	}
	return Allow
}

// Filter picks entries. The zero Filter takes all, one with both fields set
// what either would take.
type Filter struct{ Denied, Audit bool }

func (f Filter) takes(e Entry) bool {
	switch e.Verdict() {
	case Deny:
		return f.Denied || !f.Audit
	case Audit:
		return f.Audit || !f.Denied
	}
	return !f.Denied && !f.Audit
}

// Rate is the state of a token bucket.
type Rate struct {
	Tenant, Rule string // Rule "": of a whole policy
	Scope        netpol.Scope
	Bits         uint64  // a second
	Full         float64 // 0 to 1 of the burst in use now
}

// Budget is the state of a byte budget in the kernel.
type Budget struct {
	Tenant       string
	Slot         uint32 // 0: of all sandboxes of the tenant
	Window       uint64 // its start, Unix seconds
	Limit, Spent uint64
}

// Audited is a flow that a policy in audit mode let pass.
type Audited struct {
	Tenant, Rule   string // of the deny rule; "" if no rule allows it
	Dst            netip.Addr
	Port           uint16
	Proto          netpol.Proto
	Packets, Bytes uint64
}

// Name is a name that the resolver let a sandbox learn.
type Name struct {
	Name    string
	Addrs   []netip.Addr
	Rules   []int // of the program in force
	Expires time.Time
}

// Resolver is what the resolver of a sandbox has counted since it started.
type Resolver struct {
	Outcomes map[string]uint64
	BytesIn  uint64
	BytesOut uint64
}
