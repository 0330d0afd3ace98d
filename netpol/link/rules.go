// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"net/netip"
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
	countCapped      = "capped"      // a new connection of a sandbox that has too many
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

// Names of the sets, less the side's suffix.
const (
	setConnections = "connections" // address -> its connections; the kernel drops those without any
	setResting     = "resting"     // addresses that are at the cap just now
	setCapped      = "capped"      // address -> counter of what the cap dropped
	setSeen        = "seen"        // addresses that conntrack may have entries of
	setPublished   = "published"   // protocol and host port -> address and port
	setOpen        = "open"        // address, protocol and port that are published
)

// sets answers the named sets and maps of the table.
func (m *Manager) sets(t *nftables.Table) []*nftables.Set {
	proto, port := nftables.TypeInetProto, nftables.TypeInetService
	var all []*nftables.Set
	for _, s := range sides {
		all = append(all,
			&nftables.Set{Name: setConnections + s.suffix, KeyType: s.typ, Dynamic: true},
			&nftables.Set{Name: setResting + s.suffix, KeyType: s.typ, Dynamic: true, HasTimeout: true},
			&nftables.Set{Name: setCapped + s.suffix, KeyType: s.typ, Dynamic: true},
			&nftables.Set{Name: setSeen + s.suffix, KeyType: s.typ, Dynamic: true},
			&nftables.Set{Name: setPublished + s.suffix, IsMap: true, KeyType: nftables.MustConcatSetType(proto, port),
				DataType: nftables.MustConcatSetType(s.typ, port)},
			&nftables.Set{Name: setOpen + s.suffix, KeyType: nftables.MustConcatSetType(s.typ, proto, port)},
		)
	}
	for i, s := range all {
		s.Table, s.ID = t, uint32(i+1)
		if s.Dynamic {
			s.Size = maxElements
		}
	}
	return all
}

// chain is a base chain and its rules, in order.
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
//	chain prerouting  { type filter hook prerouting priority raw
//	  iifname "bh*" meta mark & 0xffff0000 != 0x62680000 counter name unmarked drop }
//	chain publish     { type nat hook prerouting priority dstnat
//	  iifname != "bh*" fib daddr type local dnat ip to meta l4proto . th dport map @published4 }
//	chain input       { type filter hook input priority filter
//	  iifname "bh*" counter name to_host drop }
//	chain forward     { type filter hook forward priority filter
//	  iifname "bh*" oifname "bh*" counter name to_sandbox drop
//	  iifname "bh*" ct state invalid counter name invalid drop
//	  iifname "bh*" ct state new ct status & confirmed == 0 ip saddr @resting4
//	    add @capped4 { ip saddr counter } counter name capped drop
//	  iifname "bh*" ct state new ct status & confirmed == 0
//	    add @connections4 { ip saddr ct count over MaxConnections } add @resting4 { ip saddr }
//	    add @capped4 { ip saddr counter } counter name capped drop
//	  iifname "bh*" ct state new ct status & confirmed == 0
//	    cannot add @seen4 { ip saddr } counter name capped drop
//	  oifname "bh*" ct direction original ct status dnat
//	    ip daddr . meta l4proto . th dport @open4 add @seen4 { ip daddr } accept
//	  oifname "bh*" ct direction original ct status dnat ct state != related
//	    counter name unsolicited drop
//	  oifname "bh*" ct state established,related accept
//	  oifname "bh*" counter name unsolicited drop }
//	chain postrouting { type nat hook postrouting priority srcnat
//	  ip saddr <pool4> oifname != "bh*" masquerade }
//
// A connection is counted with its first packet and never again: the kernel
// does not know one that it has counted already.
func (m *Manager) chains(t *nftables.Table) []chain {
	accept := nftables.ChainPolicyAccept
	base := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority, rules ...tableRule) chain {
		spec := &nftables.Chain{Name: name, Table: t, Type: typ, Hooknum: hook, Priority: prio, Policy: &accept}
		return chain{spec, rules}
	}
	from, to := m.fromSandbox(), m.toSandbox()
	inbound := [][]expr.Any{to, ctDirection(ctOriginal), ctStatus(ctDNATed, true)}

	publish, forward, postrouting := []tableRule{}, []tableRule{
		rule("sandboxes stay apart", from, to, drop(countToSandbox)),
		rule("no packet without a flow", from, ctState(expr.CtStateBitINVALID), drop(countInvalid)),
	}, []tableRule{}
	for _, s := range sides {
		publish = append(publish, rule("published ports", m.notFromSandbox(), toLocal(), s.match(), s.redirect()))
		first := [][]expr.Any{from, s.match(), ctState(expr.CtStateBitNEW), ctStatus(ctConfirmed, false), s.source()}
		forward = append(forward,
			rule("at the cap a moment ago", append(first, s.inSet(setResting), s.countCapped())...),
			rule("cap on connections", append(first, s.overCap(m.cfg.MaxConnections), s.rest(), s.countCapped())...),
			rule("nothing goes unseen", append(first, s.unseen(), drop(countCapped))...))
	}
	for _, s := range sides {
		forward = append(forward, rule("published ports", append(inbound, s.match(), s.isOpen(), s.seen(), verdict(expr.VerdictAccept))...))
	}
	forward = append(forward,
		rule("no longer published", append(inbound, notRelated(), drop(countUnsolicited))...),
		rule("answers", to, ctState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), verdict(expr.VerdictAccept)),
		rule("nothing else comes in", to, drop(countUnsolicited)))
	for _, pool := range []netip.Prefix{m.cfg.Pool4, m.cfg.Pool6} {
		postrouting = append(postrouting, rule("NAT", sourceIn(pool), m.notToSandbox(), []expr.Any{&expr.Masq{}}))
	}

	const filter, nat = nftables.ChainTypeFilter, nftables.ChainTypeNAT
	return []chain{
		base("prerouting", filter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw,
			rule("passed by no egress program", from, unmarked(), drop(countUnmarked))),
		base("publish", nat, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, publish...),
		base("input", filter, nftables.ChainHookInput, nftables.ChainPriorityFilter,
			rule("the host is out of reach", from, drop(countToHost))),
		base("forward", filter, nftables.ChainHookForward, nftables.ChainPriorityFilter, forward...),
		base("postrouting", nat, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, postrouting...),
	}
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

// source puts the source into register 1, for the sets keyed by address.
func (s side) source() []expr.Any { return []expr.Any{s.load(s.saddr, 1)} }

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

func (s side) overCap(limit uint32) []expr.Any {
	return []expr.Any{s.update(setConnections, 0, &expr.Connlimit{Count: limit, Flags: expr.NFT_CONNLIMIT_F_INV})}
}

func (s side) rest() []expr.Any { return []expr.Any{s.update(setResting, capRest)} }

func (s side) countCapped() []expr.Any {
	return append([]expr.Any{s.update(setCapped, 0, &expr.Counter{})}, drop(countCapped)...)
}

// seen notes that conntrack gets an entry of the address in register 1, and
// matches if that could be noted; unseen matches if it could not.
func (s side) seen() []expr.Any { return []expr.Any{s.update(setSeen, 0)} }

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
