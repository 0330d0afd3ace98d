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
//   - otherwise the first allow rule in order that matches the address
//     decides, then the first that matches a name which the address was
//     resolved from. An allow rule counts only inside the guardrail of every
//     layer before its own;
//   - otherwise the flow is denied. There is no default allow, and a chain
//     without layers denies everything.
//
// A rule matches an address when one of its targets does; a target matches
// when its CIDR contains the address and none of its exceptions does. It
// matches a name when the pattern of one of its targets does.
//
// The layers at the end of the chain that are all in audit mode only watch:
// what one of their deny rules would deny, or what no rule allows, passes and
// is recorded, if it lies inside the guardrails of all layers before the first
// of them. Such a deny rule also lets pass what an allow rule allows.
// A layer in audit mode with an enforcing layer after it enforces.
//
// Hard denies (HardDenied, the host, other sandboxes) are not part of a
// Program. The datapath checks them before it looks at one.
//
// Removing a key, a rule, a target or a port from a policy is an error or
// leaves the policy as narrow as it was or narrower, unless what is removed
// is itself a restriction in plain sight: an exception, a deny rule, one of a
// deny rule's targets or ports, a guardrail, a rate or a budget. That is why
// an empty list is not the same as an absent one, and why every rule must name
// its action.
package netpol

import (
	"fmt"
	"net/netip"
)

// Proto is an IP protocol number. Only TCP, UDP and ICMP echo can be allowed.
type Proto uint8

// The protocols that a policy can name. ICMP stands for ICMPv6 too; its only
// port is EchoPort, the echo request.
const (
	ICMP Proto = 1
	TCP  Proto = 6
	UDP  Proto = 17
)

// EchoPort is the port of an ICMP echo request in a Flow, a PortRange and a
// PortRule, for both families: its type in ICMPv4.
const EchoPort = 8

// String is the name used in policies: icmp, tcp, udp.
func (p Proto) String() string {
	switch p {
	case ICMP:
		return "icmp"
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

// The modes.
const (
	ModeEnforce Mode = iota // drop what the policy does not allow
	ModeAudit               // let it pass where the layers before leave it open, and record it
)

func (m Mode) String() string {
	switch m {
	case ModeEnforce:
		return "enforce"
	case ModeAudit:
		return "audit"
	}
	return fmt.Sprintf("mode %d", uint8(m))
}

// Limits. They keep a policy readable and its compiled form inside the
// kernel's maps; the parser and Compile name the one that was passed.
const (
	MaxPolicyBytes = 1 << 20 // size of one policy file
	MaxRules       = 1024    // rules of a chain of layers
	MaxRated       = 16      // those that have a rate
	MaxTargets     = 16384   // targets and exceptions of a chain of layers, those of guardrails included
	MaxPortRules   = 32      // port rules of one Entry

	MaxLearnedSteps = 16   // steps of one Learned
	MaxLevels       = 7    // rates, and budgets, of a chain
	MaxPublished    = 8    // published ports of a sandbox
	MinRate         = 8000 // bits a second
)

// Policy is one parsed and normalised egress policy.
type Policy struct {
	Name      string
	Rules     []Rule
	Guardrail *Guardrail // nil: the policy does not bound the layers after it
	Mode      Mode
	Rates     []RateLimit // at most one of each scope
	Budgets   []Budget    // at most one of each scope
	Source    string      // file it was read from; "" if it was not read from one
}

// Scope says whose traffic a limit adds up.
type Scope uint8

// The scopes.
const (
	ScopeTenant  Scope = iota // all sandboxes, on this node, of the tenant whose policy it is and of all below it
	ScopeSandbox              // each sandbox for itself
)

// String is the name used in policies: tenant, sandbox.
func (s Scope) String() string {
	switch s {
	case ScopeTenant:
		return "tenant"
	case ScopeSandbox:
		return "sandbox"
	}
	return fmt.Sprintf("scope %d", uint8(s))
}

// RateLimit bounds the speed of all allowed egress.
type RateLimit struct {
	Scope Scope
	Bits  uint64 // a second; at least MinRate
	Line  int
}

// Window is the period after which a budget begins anew, in UTC.
type Window uint8

// The windows.
const (
	PerHour Window = iota
	PerDay
	PerMonth
)

// String is the name used in policies: hour, day, month.
func (w Window) String() string {
	switch w {
	case PerHour:
		return "hour"
	case PerDay:
		return "day"
	case PerMonth:
		return "month"
	}
	return fmt.Sprintf("window %d", uint8(w))
}

// Budget bounds the L3 bytes of all allowed egress in a window. What goes
// beyond it is dropped.
type Budget struct {
	Scope Scope
	Bytes uint64
	Per   Window
	Line  int
}

// Rule allows or denies flows to its targets.
type Rule struct {
	Name   string // unique in the policy
	Action Action
	To     []Target    // at least one
	Ports  []PortRange // at least one; a deny rule without ports denies every port and protocol
	Rate   uint64      // bits a second of each sandbox under this rule; 0: no limit of its own
	Line   int         // in Policy.Source; 0 if unknown
}

// Target is a set of addresses of one family, or the names that a pattern
// matches. Exactly one of CIDR and FQDN is set.
//
// A deny rule's FQDN refuses the names, whatever the port: they are not
// resolved, and no address is learned from them. It does not close their
// addresses, which other names may share.
type Target struct {
	CIDR         netip.Prefix
	Except       []netip.Prefix // each inside CIDR and smaller
	FQDN         string         // lower case, no dot at the end; "*." stands for one label, "**." for one or more, in front only
	AllowPrivate bool           // of FQDN: addresses in private networks count too
	Line         int            // in Policy.Source; 0 if unknown
}

// PortRange is the ports Lo to Hi of one protocol, both included.
type PortRange struct {
	Lo, Hi uint16
	Proto  Proto
}

// echoPort is the port of ICMP echo requests, echo/icmp in policies.
var echoPort = PortRange{EchoPort, EchoPort, ICMP}

// String is the form used in policies: 443/tcp, 8000-8010/tcp, any/udp,
// echo/icmp.
func (r PortRange) String() string {
	switch {
	case r == echoPort:
		return "echo/icmp"
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
// prefix that contains the destination decides first; if none of its steps
// matches, or only one that stands for the lack of a rule, what names have
// resolved to that destination does; otherwise the flow is denied. The zero
// Program denies everything.
type Program struct {
	Rules     []RuleRef
	Entries   []Entry // sorted by address, then by prefix length
	Names     []NameRule
	Rates     []ProgramRate
	Budgets   []ProgramBudget
	Rails     []Rail // what bounds Names and audit; in the order of the layers
	Published []Published
	Mode      Mode     // ModeAudit: steps or names may be let pass for audit alone
	AuditIn   int      // in ModeAudit, nothing is let pass outside the first so many of Rails
	Digest    [32]byte // equal for programs that decide and count alike

	byPattern map[string][]int // indices of Names; nil: not known, all are looked at
}

// RuleRef names a rule of the chain. ID is its index in Program.Rules.
type RuleRef struct {
	ID     uint16
	Tenant string
	Name   string
	Action Action
	Rate   uint64 // bits a second of each sandbox; 0: none
}

// NameRule is what one rule says about the names of one pattern.
type NameRule struct {
	Pattern      string
	Rule         uint16 // index in Program.Rules
	Deny         bool   // the names are refused
	Audit        bool   // of Deny: they are resolved nevertheless, and that is recorded
	AllowPrivate bool
	Ports        []PortRange
	Within       int // it holds only inside the first so many of Program.Rails
}

// Rail is the guardrail of one layer.
type Rail struct {
	Tenant string
	Bounds []Bound
}

// ProgramRate is a RateLimit of one layer.
type ProgramRate struct {
	Tenant string
	Scope  Scope
	Bits   uint64
}

// ProgramBudget is a Budget of one layer.
type ProgramBudget struct {
	Tenant string
	Scope  Scope
	Bytes  uint64
	Per    Window
}

// Published is a port of the sandbox that the outside may connect to; the
// answers leave under Rule.
type Published struct {
	Port  uint16
	Proto Proto
	Rule  uint16
}

// Learned is what names allow at an address that they resolved to.
type Learned struct {
	Addr  netip.Addr
	Steps []PortRule // at most MaxLearnedSteps
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
	Audit  bool   // passes and is recorded: Deny says by a deny rule, else because no rule allows it
	Rule   uint16 // index in Program.Rules; NoRule if no rule allows it
}

// NoRule is the Rule of a step that stands for the lack of one.
const NoRule = 0xffff

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
	Rule    int    // index in Program.Rules; -1 if no rule matched
	Audit   string // the reason that it would have been denied for; "" if it is not let pass for audit
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
