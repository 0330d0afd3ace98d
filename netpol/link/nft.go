// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Counters of the table. They are named, so they go on when Open replaces the
// rules; only Purge resets them.
const (
	countUnmarked    = "unmarked"    // from a sandbox link without the program's mark
	countToHost      = "to_host"     // from a sandbox link to the host itself
	countToSandbox   = "to_sandbox"  // from a sandbox link to another
	countInvalid     = "invalid"     // from a sandbox link, fits no flow: NAT would let it out bare
	countUnsolicited = "unsolicited" // to a sandbox link, answers nothing
)

var counterNames = []string{countUnmarked, countToHost, countToSandbox, countInvalid, countUnsolicited}

// chain is a base chain and its rules, in order.
type chain struct {
	spec  *nftables.Chain
	rules [][]expr.Any
}

func (m *Manager) table() *nftables.Table {
	return &nftables.Table{Name: m.cfg.Table, Family: nftables.TableFamilyINet}
}

// chains answers the whole table:
//
//	chain prerouting  { type filter hook prerouting priority raw
//	  iifname "bh*" meta mark & 0xffff0000 != 0x62680000 counter name unmarked drop }
//	chain input       { type filter hook input priority filter
//	  iifname "bh*" counter name to_host drop }
//	chain forward     { type filter hook forward priority filter
//	  iifname "bh*" oifname "bh*" counter name to_sandbox drop
//	  iifname "bh*" ct state invalid counter name invalid drop
//	  oifname "bh*" ct state established,related accept
//	  oifname "bh*" counter name unsolicited drop }
//	chain postrouting { type nat hook postrouting priority srcnat
//	  ip  saddr <pool4> oifname != "bh*" masquerade
//	  ip6 saddr <pool6> oifname != "bh*" masquerade }
func (m *Manager) chains(t *nftables.Table) []chain {
	accept := nftables.ChainPolicyAccept
	base := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
		return &nftables.Chain{Name: name, Table: t, Type: typ, Hooknum: hook, Priority: prio, Policy: &accept}
	}
	from, to := m.fromSandbox(), m.toSandbox()
	const filter, nat = nftables.ChainTypeFilter, nftables.ChainTypeNAT
	return []chain{
		{
			base("prerouting", filter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw),
			[][]expr.Any{rule(from, unmarked(), drop(countUnmarked))},
		},
		{
			base("input", filter, nftables.ChainHookInput, nftables.ChainPriorityFilter),
			[][]expr.Any{rule(from, drop(countToHost))},
		},
		{
			base("forward", filter, nftables.ChainHookForward, nftables.ChainPriorityFilter),
			[][]expr.Any{
				rule(from, to, drop(countToSandbox)),
				rule(from, ctState(expr.CtStateBitINVALID), drop(countInvalid)),
				rule(to, ctState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), verdict(expr.VerdictAccept)),
				rule(to, drop(countUnsolicited)),
			},
		},
		{
			base("postrouting", nat, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource),
			[][]expr.Any{
				rule(sourceIn(m.cfg.Pool4), m.notToSandbox(), []expr.Any{&expr.Masq{}}),
				rule(sourceIn(m.cfg.Pool6), m.notToSandbox(), []expr.Any{&expr.Masq{}}),
			},
		},
	}
}

// installTable makes the table what chains says, in one transaction. Chains
// that exist keep their hooks: replacing a whole table would leave an instant
// in which a packet passes the new chain before its rules count and the old
// chain after its rules stopped counting.
func (m *Manager) installTable() error {
	have, err := m.nftc.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list nftables chains: %w", err)
	}
	t := m.table()
	want := m.chains(t)
	existing := map[string]*nftables.Chain{}
	replace := false
	for _, h := range have {
		if h.Table.Name != t.Name {
			continue
		}
		existing[h.Name] = h
		if !isWanted(h, want) {
			replace = true // made by another version; only a new table will do
		}
	}
	if replace {
		m.nftc.DelTable(t)
		clear(existing)
	}
	m.nftc.AddTable(t)
	counters, err := m.counters()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range counterNames {
		if _, ok := counters[name]; ok && !replace {
			continue
		}
		m.nftc.AddObj(&nftables.NamedObj{Table: t, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
	}
	for _, c := range want {
		m.nftc.AddChain(c.spec)
		if existing[c.spec.Name] != nil {
			m.nftc.FlushChain(c.spec)
		}
		for _, r := range c.rules {
			m.nftc.AddRule(&nftables.Rule{Table: t, Chain: c.spec, Exprs: r})
		}
	}
	if err := m.nftc.Flush(); err != nil {
		return fmt.Errorf("install nftables table inet %s: %w", t.Name, err)
	}
	return nil
}

func isWanted(h *nftables.Chain, want []chain) bool {
	for _, w := range want {
		if w.spec.Name == h.Name {
			return h.Type == w.spec.Type && h.Hooknum != nil && *h.Hooknum == *w.spec.Hooknum &&
				h.Priority != nil && *h.Priority == *w.spec.Priority
		}
	}
	return false
}

// Purge removes the table, NAT and second layer with it. Links stay.
func (m *Manager) Purge() error {
	tables, err := m.nftc.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	for _, t := range tables {
		if t.Name != m.cfg.Table {
			continue
		}
		m.nftc.DelTable(t)
		if err := m.nftc.Flush(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove nftables table inet %s: %w", t.Name, err)
		}
	}
	return nil
}

// SecondLayerDrops answers what the second layer caught since the table was
// made: packets from sandbox links that bore no mark, or that bore one and
// went to the host or to another sandbox. The egress program should have
// dropped every one of them; a growing number means that a link runs without
// its program, or that the program is wrong. Dropped answers and unsolicited
// packets are not in it.
func (m *Manager) SecondLayerDrops() (packets, bytes uint64, err error) {
	c, err := m.counters()
	if err != nil {
		return 0, 0, err
	}
	for _, name := range []string{countUnmarked, countToHost, countToSandbox} {
		v, ok := c[name]
		if !ok {
			return 0, 0, fmt.Errorf("counter %s of table inet %s: %w", name, m.cfg.Table, fs.ErrNotExist)
		}
		packets += v.Packets
		bytes += v.Bytes
	}
	return packets, bytes, nil
}

func (m *Manager) counters() (map[string]expr.Counter, error) {
	nftc := &nftables.Conn{} // apart from a transaction that is being built
	objs, err := nftc.GetNamedObjects(m.table())
	if err != nil {
		return nil, fmt.Errorf("read counters of table inet %s: %w", m.cfg.Table, err)
	}
	all := map[string]expr.Counter{}
	for _, o := range objs {
		if n, ok := o.(*nftables.NamedObj); ok && n.Type == nftables.ObjTypeCounter {
			if c, ok := n.Obj.(*expr.Counter); ok {
				all[n.Name] = *c
			}
		}
	}
	return all, nil
}

func rule(parts ...[]expr.Any) []expr.Any {
	var r []expr.Any
	for _, p := range parts {
		r = append(r, p...)
	}
	return r
}

// ifname matches links by the prefix of their name: a comparison that is
// shorter than a name.
func (m *Manager) ifname(key expr.MetaKey, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: []byte(m.cfg.LinkPrefix)},
	}
}

func (m *Manager) fromSandbox() []expr.Any  { return m.ifname(expr.MetaKeyIIFNAME, expr.CmpOpEq) }
func (m *Manager) toSandbox() []expr.Any    { return m.ifname(expr.MetaKeyOIFNAME, expr.CmpOpEq) }
func (m *Manager) notToSandbox() []expr.Any { return m.ifname(expr.MetaKeyOIFNAME, expr.CmpOpNeq) }

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func unmarked() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native32(MarkMask), Xor: native32(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: native32(Mark)},
	}
}

func ctState(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native32(bits), Xor: native32(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: native32(0)},
	}
}

func sourceIn(p netip.Prefix) []expr.Any {
	proto, offset := byte(unix.NFPROTO_IPV4), uint32(12)
	if p.Addr().Is6() {
		proto, offset = unix.NFPROTO_IPV6, 8
	}
	addr := p.Addr().AsSlice()
	mask := make([]byte, len(addr))
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	n := uint32(len(addr))
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: addr},
	}
}

func drop(counter string) []expr.Any {
	return append([]expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: counter}}, verdict(expr.VerdictDrop)...)
}

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }
