// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Counters of the table. They are named, so they go on when the rules are
// replaced; only Purge resets them.
const (
	countUnmarked    = "unmarked"    // from a sandbox link without the program's mark
	countToHost      = "to_host"     // from a sandbox link to the host itself
	countToSandbox   = "to_sandbox"  // from a sandbox link to another
	countInvalid     = "invalid"     // from a sandbox link, fits no flow: NAT would let it out bare
	countCapped      = "capped"      // a new connection of a sandbox that has too many, or opens them too fast
	countUnsolicited = "unsolicited" // to a sandbox link, answers nothing
)

var counterNames = []string{countUnmarked, countToHost, countToSandbox, countInvalid, countCapped, countUnsolicited}

// capRest is how long a sandbox at its cap opens nothing, once a connection
// too many was seen. To count, the kernel looks at every connection of the
// address, and keeps a note of each attempt until it has looked again; so it
// counts at most once in this time for who floods.
const capRest = 50 * time.Millisecond

// maxElements bounds the sets, which are keyed by sandbox.
const maxElements = 1<<16 - 1

// The 32-bit registers that a key of several parts is put together in.
const (
	reg32 = unix.NFT_REG32_00
	word  = 4 // bytes that each part of a key takes at least
)

// Bits of a connection's status, from linux/netfilter/nf_conntrack_common.h.
const (
	ctConfirmed = 1 << 3 // IPS_CONFIRMED: not the first packet
	ctDNATed    = 1 << 5 // IPS_DST_NAT
)

// ctOriginal is the direction of who opened the connection.
const ctOriginal = 0

// side is one address family's part of the table.
type side struct {
	suffix       string // of the sets' names
	proto        byte
	saddr, daddr uint32 // offsets in the IP header
	size         uint32 // bytes of an address
	typ          nftables.SetDatatype
}

var sides = [...]side{
	{"4", unix.NFPROTO_IPV4, 12, 16, 4, nftables.TypeIPAddr},
	{"6", unix.NFPROTO_IPV6, 8, 24, 16, nftables.TypeIP6Addr},
}

func sideOf(a netip.Addr) side {
	if a.Is4() {
		return sides[0]
	}
	return sides[1]
}

// Names of the sets, less the side's suffix. Those of the limits are in
// bounds.
const (
	setCapped    = "capped"    // address -> counter of what the limits dropped
	setSeen      = "seen"      // addresses that conntrack may have entries of
	setPublished = "published" // protocol and host port -> address and port
	setOpen      = "open"      // address, protocol and port that are published
)

// bound is one direction in which connections of a sandbox are limited: a
// chain that their first packets go through, and its sets.
type bound struct {
	chain       string
	connections string // address -> its connections; the kernel drops those without any
	resting     string // addresses that are at the cap just now
	opening     string // address -> limit on how fast it gets connections
	inbound     bool   // the sandbox's address is the destination
}

var (
	begun   = bound{"begun", "connections", "resting", "opening", false}
	reached = bound{"reached", "connections_in", "resting_in", "opening_in", true}
	bounds  = [...]bound{reached, begun}
)

// chainInbound holds what is done with packets of who connects from outside.
const chainInbound = "inbound"

// sets answers the named sets and maps of the table.
func (m *Manager) sets(t *nftables.Table) []*nftables.Set {
	proto, port := nftables.TypeInetProto, nftables.TypeInetService
	var all []*nftables.Set
	for _, s := range sides {
		all = append(all,
			&nftables.Set{Name: setCapped + s.suffix, KeyType: s.typ, Dynamic: true},
			&nftables.Set{Name: setSeen + s.suffix, KeyType: s.typ, Dynamic: true},
			&nftables.Set{Name: setPublished + s.suffix, IsMap: true, KeyType: nftables.MustConcatSetType(proto, port),
				DataType: nftables.MustConcatSetType(s.typ, port)},
			&nftables.Set{Name: setOpen + s.suffix, KeyType: nftables.MustConcatSetType(s.typ, proto, port)},
		)
		for _, b := range bounds {
			all = append(all,
				&nftables.Set{Name: b.connections + s.suffix, KeyType: s.typ, Dynamic: true},
				&nftables.Set{Name: b.resting + s.suffix, KeyType: s.typ, Dynamic: true, HasTimeout: true},
				&nftables.Set{Name: b.opening + s.suffix, KeyType: s.typ, Dynamic: true, HasTimeout: true},
			)
		}
	}
	for i, s := range all {
		s.Table, s.ID = t, uint32(i+1)
		if s.Dynamic {
			s.Size = maxElements
		}
	}
	return all
}

// chain is a chain and its rules, in order.
type chain struct {
	spec  *nftables.Chain
	rules []tableRule
}

// tableRule is a rule and the words that nft shows beside it.
type tableRule struct {
	comment string
	exprs   []expr.Any
}

func (m *Manager) table() *nftables.Table {
	return &nftables.Table{Name: m.cfg.Table, Family: nftables.TableFamilyINet}
}

// chains answers the whole table, here for IPv4:
//
//	chain reached     { # the first packet of a connection to a published port
//	  ip daddr @resting_in4 add @capped4 { ip daddr counter } counter name capped drop
//	  update @opening_in4 { ip daddr timeout .. limit rate over NewConnectionsPerSecond/second burst MaxConnections }
//	    add @capped4 { ip daddr counter } counter name capped drop
//	  add @connections_in4 { ip daddr ct count over MaxConnections } add @resting_in4 { ip daddr }
//	    add @capped4 { ip daddr counter } counter name capped drop
//	  cannot add @seen4 { ip daddr } counter name capped drop
//	  ct timeout set "tcp" }
//	chain begun       { # the first packet of a connection that a sandbox begins
//	  the same with ip saddr, @resting4, @opening4 and @connections4 }
//	chain inbound     { # who connects from outside
//	  ct status & confirmed == 0 ip daddr . meta l4proto . th dport @open4 jump reached
//	  ip daddr . meta l4proto . th dport @open4 meta mark set 0x62690000 accept
//	  ct state != related counter name unsolicited drop }
//	chain prerouting  { type filter hook prerouting priority raw
//	  iifname "bh*" meta mark & 0xffff0000 != 0x62680000 counter name unmarked drop }
//	chain publish     { type nat hook prerouting priority dstnat
//	  iifname != "bh*" fib daddr type local dnat ip to meta l4proto . th dport map @published4 }
//	chain input       { type filter hook input priority filter
//	  iifname "bh*" counter name to_host drop }
//	chain forward     { type filter hook forward priority filter
//	  iifname "bh*" oifname "bh*" counter name to_sandbox drop
//	  iifname "bh*" ct state invalid counter name invalid drop
//	  iifname "bh*" ct status & confirmed == 0 jump begun
//	  oifname "bh*" ct direction original ct status dnat jump inbound
//	  oifname "bh*" ct state established,related accept
//	  oifname "bh*" counter name unsolicited drop }
//	chain postrouting { type nat hook postrouting priority srcnat
//	  ip saddr <pool4> oifname != "bh*" masquerade }
//
// A connection is counted with its first packet and never again: the kernel
// does not know one that it has counted already. What is dropped before
// postrouting is over is not confirmed, and takes no place in conntrack.
func (m *Manager) chains(t *nftables.Table) []chain {
	accept := nftables.ChainPolicyAccept
	base := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority, rules ...tableRule) chain {
		spec := &nftables.Chain{Name: name, Table: t, Type: typ, Hooknum: hook, Priority: prio, Policy: &accept}
		return chain{spec, rules}
	}
	regular := func(name string, rules ...tableRule) chain {
		return chain{&nftables.Chain{Name: name, Table: t}, rules}
	}
	from, to := m.fromSandbox(), m.toSandbox()

	var publish, enter, open, postrouting []tableRule
	for _, s := range sides {
		publish = append(publish, rule("published ports", m.notFromSandbox(), toLocal(), s.match(), s.redirect()))
		enter = append(enter, rule("limits", ctStatus(ctConfirmed, false), s.match(), s.isOpen(), jump(reached.chain)))
		open = append(open, rule("published ports", s.match(), s.isOpen(), setMark(MarkInbound), verdict(expr.VerdictAccept)))
	}
	inbound := append(append(enter, open...), rule("no longer published", notRelated(), drop(countUnsolicited)))
	for _, pool := range []netip.Prefix{m.cfg.Pool4, m.cfg.Pool6} {
		postrouting = append(postrouting, rule("NAT", sourceIn(pool), m.notToSandbox(), []expr.Any{&expr.Masq{}}))
	}

	var all []chain // those that are jumped to first
	for _, b := range bounds {
		all = append(all, regular(b.chain, m.limits(b)...))
	}
	const filter, nat = nftables.ChainTypeFilter, nftables.ChainTypeNAT
	return append(all,
		regular(chainInbound, inbound...),
		base("prerouting", filter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw,
			rule("passed by no egress program", from, unmarked(), drop(countUnmarked))),
		base("publish", nat, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, publish...),
		base("input", filter, nftables.ChainHookInput, nftables.ChainPriorityFilter,
			rule("the host is out of reach", from, drop(countToHost))),
		base("forward", filter, nftables.ChainHookForward, nftables.ChainPriorityFilter,
			rule("sandboxes stay apart", from, to, drop(countToSandbox)),
			rule("no packet without a flow", from, ctState(expr.CtStateBitINVALID), drop(countInvalid)),
			rule("limits", from, ctStatus(ctConfirmed, false), jump(begun.chain)),
			rule("who connects from outside", to, ctDirection(ctOriginal), ctStatus(ctDNATed, true), jump(chainInbound)),
			rule("answers", to, ctState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), verdict(expr.VerdictAccept)),
			rule("nothing else comes in", to, drop(countUnsolicited))),
		base("postrouting", nat, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, postrouting...),
	)
}

// limits answers the rules for the first packet of a connection. The rate
// comes before the cap, which costs more to look at.
func (m *Manager) limits(b bound) []tableRule {
	var all []tableRule
	for _, s := range sides {
		first := [][]expr.Any{s.match(), s.address(b)}
		limit := func(comment string, parts ...[]expr.Any) {
			all = append(all, rule(comment, append(slices.Clone(first), parts...)...))
		}
		limit("at the cap a moment ago", s.inSet(b.resting), s.countCapped())
		limit("rate of new connections", s.tooFast(b, m.cfg), s.countCapped())
		limit("cap on connections", s.overCap(b, m.cfg), s.rest(b), s.countCapped())
		limit("nothing goes unseen", s.unseen(), drop(countCapped))
	}
	return append(all, rule("closed ones go soon", setTimeouts()))
}

func rule(comment string, parts ...[]expr.Any) tableRule {
	r := tableRule{comment: comment}
	for _, p := range parts {
		r.exprs = append(r.exprs, p...)
	}
	return r
}

func (r tableRule) userData() []byte {
	return userdata.AppendString(nil, userdata.TypeComment, r.comment)
}

// ifname matches links by the prefix of their name: a comparison that is
// shorter than a name.
func (m *Manager) ifname(key expr.MetaKey, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: []byte(m.cfg.LinkPrefix)},
	}
}

func (m *Manager) fromSandbox() []expr.Any    { return m.ifname(expr.MetaKeyIIFNAME, expr.CmpOpEq) }
func (m *Manager) notFromSandbox() []expr.Any { return m.ifname(expr.MetaKeyIIFNAME, expr.CmpOpNeq) }
func (m *Manager) toSandbox() []expr.Any      { return m.ifname(expr.MetaKeyOIFNAME, expr.CmpOpEq) }
func (m *Manager) notToSandbox() []expr.Any   { return m.ifname(expr.MetaKeyOIFNAME, expr.CmpOpNeq) }

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// setMark marks a packet. It uses register 1.
func setMark(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: native32(mark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}
}

func unmarked() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: word, Mask: native32(MarkMask), Xor: native32(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: native32(Mark)},
	}
}

// ctBits matches a connection of which any of the bits is set, or none.
func ctBits(key expr.CtKey, bits uint32, set bool) []expr.Any {
	op := expr.CmpOpEq
	if set {
		op = expr.CmpOpNeq
	}
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: word, Mask: native32(bits), Xor: native32(0)},
		&expr.Cmp{Op: op, Register: 1, Data: native32(0)},
	}
}

func ctState(bits uint32) []expr.Any            { return ctBits(expr.CtKeySTATE, bits, true) }
func ctStatus(bits uint32, set bool) []expr.Any { return ctBits(expr.CtKeySTATUS, bits, set) }

// notRelated matches what is not an ICMP error about a connection; those
// have no port, and path MTU discovery needs them.
func notRelated() []expr.Any { return ctBits(expr.CtKeySTATE, expr.CtStateBitRELATED, false) }

func ctDirection(dir byte) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{dir}},
	}
}

// toLocal matches what is sent to an address of the host.
func toLocal() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagDADDR: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: native32(unix.RTN_LOCAL)},
	}
}

func (s side) match() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{s.proto}},
	}
}

func (s side) load(offset, register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: s.size}
}

// address puts the sandbox's address into register 1, for the sets keyed by
// address.
func (s side) address(b bound) []expr.Any {
	offset := s.saddr
	if b.inbound {
		offset = s.daddr
	}
	return []expr.Any{s.load(offset, 1)}
}

// protoAndPort puts the protocol and the destination port into two registers.
func protoAndPort(register uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register},
		&expr.Payload{DestRegister: register + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

func (s side) inSet(name string) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: name + s.suffix}}
}

// update adds the address in register 1 to a set unless it is there, and
// runs the expression of its element.
func (s side) update(name string, timeout time.Duration, e ...expr.Any) expr.Any {
	return &expr.Dynset{SrcRegKey: 1, SetName: name + s.suffix, Operation: unix.NFT_DYNSET_OP_ADD, Timeout: timeout, Exprs: e}
}

func (s side) overCap(b bound, cfg Config) []expr.Any {
	return []expr.Any{s.update(b.connections, 0, &expr.Connlimit{Count: cfg.MaxConnections, Flags: expr.NFT_CONNLIMIT_F_INV})}
}

// tooFast matches what exceeds the rate. An element goes when its bucket has
// long been full, so that a new one gives nothing away.
func (s side) tooFast(b bound, cfg Config) []expr.Any {
	refill := time.Duration(cfg.MaxConnections/cfg.NewConnectionsPerSecond+2) * time.Second
	return []expr.Any{&expr.Dynset{
		SrcRegKey: 1, SetName: b.opening + s.suffix, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: refill,
		Exprs: []expr.Any{&expr.Limit{
			Type: expr.LimitTypePkts, Rate: uint64(cfg.NewConnectionsPerSecond), Unit: expr.LimitTimeSecond,
			Burst: cfg.MaxConnections, Over: true,
		}},
	}}
}

func (s side) rest(b bound) []expr.Any { return []expr.Any{s.update(b.resting, capRest)} }

func (s side) countCapped() []expr.Any {
	return append([]expr.Any{s.update(setCapped, 0, &expr.Counter{})}, drop(countCapped)...)
}

// unseen notes that conntrack gets an entry of the address in register 1, and
// matches if that could not be noted.
func (s side) unseen() []expr.Any {
	return []expr.Any{&expr.Dynset{SrcRegKey: 1, SetName: setSeen + s.suffix, Operation: unix.NFT_DYNSET_OP_ADD, Invert: true}}
}

// redirect sends a packet to where its protocol and port are published. One
// to another port goes on.
func (s side) redirect() []expr.Any {
	return append(protoAndPort(reg32),
		&expr.Lookup{SourceRegister: reg32, DestRegister: reg32, IsDestRegSet: true, SetName: setPublished + s.suffix},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(s.proto), RegAddrMin: reg32, RegProtoMin: reg32 + s.size/word},
	)
}

// isOpen matches a packet whose destination a sandbox has published. The
// address begins the key, so it is in register 1 too.
func (s side) isOpen() []expr.Any {
	key := append([]expr.Any{s.load(s.daddr, reg32)}, protoAndPort(reg32+s.size/word)...)
	return append(key, &expr.Lookup{SourceRegister: reg32, SetName: setOpen + s.suffix})
}

func sourceIn(p netip.Prefix) []expr.Any {
	s := sideOf(p.Addr())
	mask := make([]byte, s.size)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return append(s.match(),
		s.load(s.saddr, 1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: s.size, Mask: mask, Xor: make([]byte, s.size)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
	)
}

func drop(counter string) []expr.Any {
	return append([]expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: counter}}, verdict(expr.VerdictDrop)...)
}

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }

func jump(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}
