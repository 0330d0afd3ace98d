// SPDX-License-Identifier: Apache-2.0

// Package netpol decides what may leave a sandbox.
//
// It owns the language of egress policies: it reads them (Parse), folds a
// tenant's policy and its ancestors' into one Program (Compile), and answers
// what a Program does with a flow (Evaluate). It is pure: it touches no
// kernel, no network and no clock. netpol/enforce puts a Program into the
// kernel.
//
// Meaning of a chain of layers, ancestors first:
//
//   - a deny rule of any layer beats every allow rule, whatever the prefix
//     lengths and whoever wrote it; the first deny in order gets the hit;
//   - otherwise the first allow rule in order that matches decides. An allow
//     rule counts only inside the guardrail of every layer before its own;
//   - otherwise the flow is denied. There is no default allow, and a chain
//     without layers denies everything.
//
// A rule matches an address when one of its targets does; a target matches
// when its CIDR contains the address and none of its exceptions does.
//
// Hard denies (HardDenied, the host, other sandboxes) are not part of a
// Program. The datapath checks them before it looks at one.
//
// Removing a key, a rule, a target or a port from a policy is an error or
// leaves the policy as narrow as it was or narrower, unless what is removed
// is itself a restriction in plain sight: an exception, a deny rule, one of a
// deny rule's targets or ports, or a guardrail. That is why an empty list is
// not the same as an absent one, and why every rule must name its action.
package netpol

import (
	"fmt"
	"net/netip"
)

// Proto is an IP protocol number. Only TCP and UDP can be allowed.
type Proto uint8

// The protocols that a policy can name.
const (
	TCP Proto = 6
	UDP Proto = 17
)

// String is the name used in policies: tcp, udp.
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// Action is what a rule does with a flow that it matches. The zero Action
// denies.
type Action uint8

// The actions of a rule.
const (
	Deny Action = iota
	Allow
)

func (a Action) String() string {
	switch a {
	case Deny:
		return "deny"
	case Allow:
		return "allow"
	}
	return fmt.Sprintf("action %d", uint8(a))
}

// Mode is how a policy is applied.
type Mode uint8

// ModeEnforce drops what the policy does not allow. It is the only mode.
const ModeEnforce Mode = 0

func (m Mode) String() string {
	if m == ModeEnforce {
		return "enforce"
	}
	return fmt.Sprintf("mode %d", uint8(m))
}

// Limits. They keep a policy readable and its compiled form inside the
// kernel's maps; the parser and Compile name the one that was passed.
const (
	MaxPolicyBytes = 1 << 20 // size of one policy file
	MaxRules       = 1024    // rules of a chain of layers
	MaxTargets     = 16384   // targets and exceptions of a chain of layers, those of guardrails included
	MaxPortRules   = 32      // port rules of one Entry
)

// Policy is one parsed and normalised egress policy.
type Policy struct {
	Name      string
	Rules     []Rule
	Guardrail *Guardrail // nil: the policy does not bound the layers after it
	Mode      Mode
	Source    string // file it was read from; "" if it was not read from one
}

// Rule allows or denies flows to its targets.
type Rule struct {
	Name   string // unique in the policy
	Action Action
	To     []Target    // at least one
	Ports  []PortRange // at least one; a deny rule without ports denies every port and protocol
	Line   int         // in Policy.Source; 0 if unknown
}

// Target is a set of addresses of one family.
type Target struct {
	CIDR   netip.Prefix
	Except []netip.Prefix // each inside CIDR and smaller
	Line   int            // in Policy.Source; 0 if unknown
}

// PortRange is the ports Lo to Hi of one protocol, both included.
type PortRange struct {
	Lo, Hi uint16
	Proto  Proto
}

// String is the form used in policies: 443/tcp, 8000-8010/tcp, any/udp.
func (r PortRange) String() string {
	switch {
	case r.Lo <= 1 && r.Hi == 65535:
		return fmt.Sprintf("any/%s", r.Proto)
	case r.Lo == r.Hi:
		return fmt.Sprintf("%d/%s", r.Lo, r.Proto)
	}
	return fmt.Sprintf("%d-%d/%s", r.Lo, r.Hi, r.Proto)
}

// Guardrail bounds the allow rules of every later layer. One that is present
// and has no bounds lets later layers allow nothing. It does not bound the
// layer that it belongs to.
type Guardrail struct {
	Bounds []Bound
	Line   int
}

// Bound is one part of a guardrail: these addresses at these ports.
type Bound struct {
	To    []Target
	Ports []PortRange
	Line  int
}

// Layer is one tenant's policy in a chain. A chain lists ancestors first.
type Layer struct {
	Tenant string
	File   string // used in errors; Policy.Source if empty
	Policy Policy
}

func (l Layer) file() string {
	if l.File != "" {
		return l.File
	}
	return l.Policy.Source
}

// Program is the compiled, effective policy of a chain of layers. The longest
// prefix that contains the destination alone decides; where none does, the
// flow is denied. The zero Program denies everything.
type Program struct {
	Rules   []RuleRef
	Entries []Entry  // sorted by address, then by prefix length
	Digest  [32]byte // equal for programs that decide and count alike
}

// RuleRef names a rule of the chain. ID is its index in Program.Rules.
type RuleRef struct {
	ID     uint16
	Tenant string
	Name   string
	Action Action
}

// Entry is the whole decision for addresses whose longest matching prefix is
// Prefix. An empty Ports denies: that is how an exception looks when no other
// rule covers it.
type Entry struct {
	Prefix netip.Prefix // IPv4 or IPv6, never IPv4-mapped
	Ports  []PortRule   // the first that matches decides; at most MaxPortRules
}

// PortRule is one step of an Entry.
type PortRule struct {
	Lo, Hi uint16
	Proto  Proto
	Deny   bool
	Rule   uint16 // index in Program.Rules
}

// Flow is what a sandbox wants to send to.
type Flow struct {
	Proto Proto
	Dst   netip.Addr
	Port  uint16
}

// Reasons of a Verdict.
const (
	ReasonAllowed = "allow"     // an allow rule matched
	ReasonDenied  = "rule_deny" // a deny rule matched
	ReasonNoRule  = "no_rule"   // nothing matched
)

// Verdict is the decision about a flow.
type Verdict struct {
	Allowed bool
	Reason  string
	Rule    int // index in Program.Rules; -1 if no rule matched
}

// Error is a fault in a policy file or in a chain of layers.
type Error struct {
	File string
	Line int // 0 if unknown
	Msg  string
}

func (e *Error) Error() string {
	switch {
	case e.File == "":
		return e.Msg
	case e.Line == 0:
		return fmt.Sprintf("%s: %s", e.File, e.Msg)
	}
	return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Msg)
}
