// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ErrDrift means that the kernel does not have what this package made. The
// text of the error says what differs and what repairs it.
var ErrDrift = errors.New("network has drifted")

func drift(repair, format string, a ...any) error {
	return fmt.Errorf("%w: %s; %s", ErrDrift, fmt.Sprintf(format, a...), repair)
}

const (
	repairTable = "Restore repairs it"
	repairLink  = "take it down, then Create and Up repair it"
)

// VerifyTable compares the table with what Open made and Publish added, and
// answers ErrDrift with the first difference. It does not look at counters
// and at what packets put into sets, and not at tables of others.
//
// The kernel numbers the changes to its rules. A table that was right and has
// the same number is right, so a second call costs one short question; only
// after a change of any rule of the host is the table read again.
func (m *Manager) VerifyTable() error {
	m.rules.mu.Lock()
	defer m.rules.mu.Unlock()
	for try := 0; ; try++ {
		before, err := m.rules.rd.generation()
		if err != nil {
			return err
		}
		if before == m.rules.good {
			return nil
		}
		verr := m.verifyTable()
		after, err := m.rules.rd.generation()
		if err != nil {
			return err
		}
		if after != before && try < 5 {
			continue // it changed while it was read
		}
		if verr != nil {
			return verr
		}
		if after == before {
			m.rules.good = after
		}
		return nil
	}
}

// +checklocks:m.rules.mu
func (m *Manager) verifyTable() error {
	have, err := m.findTable()
	if err != nil {
		return err
	}
	t := m.table()
	if d := have.difference(m.chains(t), m.sets(t), true); d != "" {
		return drift(repairTable, "table inet %s: %s", t.Name, d)
	}
	if have.table.Flags != 0 {
		return drift(repairTable, "table inet %s: its flags are %#x, want none: it may be dormant", t.Name, have.table.Flags)
	}
	rules, err := m.rules.rd.ruleFacts(t.Name)
	if err != nil {
		return err
	}
	if d := ruleDifference(m.rules.made, rules); d != "" {
		return drift(repairTable, "table inet %s: %s", t.Name, d)
	}
	if err := m.verifyTimeouts(); err != nil {
		return err
	}
	return m.verifyPublished()
}

// ruleDifference names the first rule that differs, "" if none does.
func ruleDifference(want, have []fact) string {
	split := func(all []fact) map[string][]fact {
		by := map[string][]fact{}
		for _, f := range all {
			by[f.chain] = append(by[f.chain], f)
		}
		return by
	}
	w, h := split(want), split(have)
	for _, f := range want {
		i := 0
		for ; i < len(w[f.chain]) && i < len(h[f.chain]); i++ {
			if !bytes.Equal(w[f.chain][i].exprs, h[f.chain][i].exprs) {
				return fmt.Sprintf("rule %d of chain %s (%s) differs", i+1, f.chain, w[f.chain][i].comment)
			}
		}
		switch {
		case i < len(w[f.chain]):
			return fmt.Sprintf("rule %d of chain %s (%s) is missing", i+1, f.chain, w[f.chain][i].comment)
		case i < len(h[f.chain]):
			return fmt.Sprintf("chain %s has %d rules, want %d", f.chain, len(h[f.chain]), i)
		}
	}
	return ""
}

// verifyPublished compares the sets of published ports with what this process
// has asked for.
//
// +checklocks:m.rules.mu
func (m *Manager) verifyPublished() error {
	want := map[string][]string{}
	add := func(set string, elems []nftables.SetElement) error {
		for _, e := range elems {
			want[set] = append(want[set], element(e))
		}
		return nil
	}
	for id, ports := range m.rules.pub {
		if o, ok := m.known(id); ok {
			if err := m.eachPublished(o, ports, add); err != nil {
				return err
			}
		}
	}
	for _, s := range sides {
		for _, name := range []string{setPublished + s.suffix, setOpen + s.suffix} {
			elems, err := m.elements(name)
			if err != nil {
				return err
			}
			var have []string
			for _, e := range elems {
				have = append(have, element(e))
			}
			slices.Sort(have)
			slices.Sort(want[name])
			if !slices.Equal(have, want[name]) {
				return drift(repairTable, "set %s holds %d published ports that are not those of the sandboxes", name, len(have))
			}
		}
	}
	return nil
}

func element(e nftables.SetElement) string { return fmt.Sprintf("%x:%x", e.Key, e.Val) }

// Verify compares the link of a sandbox and the table with what Create, Up
// and Open made, and answers ErrDrift with the first difference. ErrNotFound
// if there is no such link.
//
// Compared are the host's end with its hardware address, flags, alias,
// addresses and sysctls, and, if it is up, its routes and neighbours: a link
// that is down carries nothing and has none. What is inside the sandbox's
// namespace may be changed by the sandbox and is not looked at.
func (m *Manager) Verify(id string) error {
	if err := m.VerifyTable(); err != nil {
		return fmt.Errorf("verify link %s: %w", id, err)
	}
	if err := m.verifyLink(id); err != nil {
		return fmt.Errorf("verify link %s: %w", id, err)
	}
	return nil
}

func (m *Manager) verifyLink(id string) error {
	name := m.HostName(id)
	host, err := m.rt.link(name)
	if err != nil {
		return err
	}
	o, err := parseAlias(host.alias)
	if err != nil {
		return drift(repairLink, "%v", err)
	}
	if known, ok := m.known(id); ok && known.alias() != o.alias() {
		return drift(repairLink, "alias is %q, want %q", o.alias(), known.alias())
	}
	switch {
	case !slices.Equal(host.mac, hostMAC):
		return drift(repairLink, "hardware address is %s, want %s", host.mac, hostMAC)
	case host.flags&unix.IFF_NOARP == 0:
		return drift(repairLink, "ARP is on")
	case host.flags&unix.IFF_MULTICAST != 0:
		return drift(repairLink, "multicast is on")
	}
	for _, s := range hostSysctls {
		if got := host.sysctl(s); got != s.value {
			return drift(repairLink, "%s is %d, want %d", s.name, got, s.value)
		}
	}
	if err := m.noAddrs(host.index); err != nil {
		return err
	}
	if !host.up {
		return nil
	}
	for _, a := range []netip.Addr{o.addr4, o.addr6} {
		if err := m.verifyPath(host.index, a, o.mac); err != nil {
			return err
		}
	}
	return nil
}

// noAddrs reports an address of the host's end.
func (m *Manager) noAddrs(index int) error {
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		addrs, err := m.rt.addrs(fam, index)
		if err != nil {
			return err
		}
		if len(addrs) > 0 {
			return drift("delete it, then Up repairs the rest", "the host's end has address %s", addrs[0])
		}
	}
	return nil
}

// verifyPath reports whether packets for an address go to its link and to
// its hardware address.
func (m *Manager) verifyPath(index int, a netip.Addr, mac net.HardwareAddr) error {
	const repair = "Up repairs it"
	dst, oif, err := m.rt.route(a)
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		return drift(repair, "there is no route to %s", a)
	case err != nil:
		return err
	case oif != index || dst != netip.PrefixFrom(a, a.BitLen()):
		return drift(repair, "the route to %s is %s through link %d, want link %d", a, dst, oif, index)
	}
	got, state, err := m.rt.neigh(index, a)
	switch {
	case errors.Is(err, unix.ENOENT):
		return drift(repair, "there is no neighbour %s", a)
	case err != nil:
		return err
	case state != unix.NUD_PERMANENT || !slices.Equal(got, mac):
		return drift(repair, "neighbour %s is %s in state %#x, want %s, permanent", a, got, state, mac)
	}
	return nil
}

// addrs answers the addresses of a link.
func (c *conn) addrs(fam, index int) ([]netip.Addr, error) {
	msg := nl.NewIfAddrmsg(fam)
	msg.Index = uint32(index)
	r := &request{op: "list addresses", msg: nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)}
	r.add(msg)
	var all []netip.Addr
	err := c.get(r, func(_ uint16, b []byte) error {
		a, on, err := parseAddr(b)
		if err == nil && on == index {
			all = append(all, a)
		}
		return err
	})
	if errors.Is(err, errInterrupted) {
		err = nil // what was there throughout was seen
	}
	return all, err
}

func parseAddr(b []byte) (a netip.Addr, index int, err error) {
	if len(b) < unix.SizeofIfAddrmsg {
		return a, 0, errShort
	}
	index = int(nl.DeserializeIfAddrmsg(b).Index)
	err = eachAttr(b[unix.SizeofIfAddrmsg:], func(typ uint16, _, value []byte) error {
		if typ == unix.IFA_ADDRESS {
			a, _ = netip.AddrFromSlice(value)
		}
		return nil
	})
	return a, index, err
}

// route answers the entry of the routing tables that a packet to an address
// follows, and its link.
func (c *conn) route(a netip.Addr) (dst netip.Prefix, oif int, err error) {
	msg := &nl.RtMsg{RtMsg: unix.RtMsg{Family: family(a), Dst_len: uint8(a.BitLen()), Flags: unix.RTM_F_FIB_MATCH}}
	r := &request{op: "read route to " + a.String(), msg: nl.NewNetlinkRequest(unix.RTM_GETROUTE, unix.NLM_F_ACK)}
	r.add(msg, nl.NewRtAttr(unix.RTA_DST, a.AsSlice()))
	err = c.get(r, func(_ uint16, b []byte) (err error) {
		dst, oif, err = parseRoute(b)
		return err
	})
	return dst, oif, err
}

func parseRoute(b []byte) (dst netip.Prefix, oif int, err error) {
	if len(b) < unix.SizeofRtMsg {
		return dst, 0, errShort
	}
	bits := int(nl.DeserializeRtMsg(b).Dst_len)
	err = eachAttr(b[unix.SizeofRtMsg:], func(typ uint16, _, value []byte) (err error) {
		switch typ {
		case unix.RTA_DST:
			a, _ := netip.AddrFromSlice(value)
			dst = netip.PrefixFrom(a, bits)
		case unix.RTA_OIF:
			oif, err = attrInt(value)
		}
		return err
	})
	return dst, oif, err
}

// neigh answers the hardware address of a neighbour, and its state.
func (c *conn) neigh(index int, a netip.Addr) (mac net.HardwareAddr, state uint16, err error) {
	r := &request{op: "read neighbour " + a.String(), msg: nl.NewNetlinkRequest(unix.RTM_GETNEIGH, unix.NLM_F_ACK)}
	r.add(&ndmsg{family: family(a), index: uint32(index)}, nl.NewRtAttr(unix.NDA_DST, a.AsSlice()))
	err = c.get(r, func(_ uint16, b []byte) (err error) {
		mac, state, err = parseNeigh(b)
		return err
	})
	return mac, state, err
}

func parseNeigh(b []byte) (mac net.HardwareAddr, state uint16, err error) {
	if len(b) < unix.SizeofNdMsg {
		return nil, 0, errShort
	}
	state = nl.NativeEndian().Uint16(b[8:])
	err = within(b[unix.SizeofNdMsg:], unix.NDA_LLADDR, func(value []byte) error {
		mac = bytes.Clone(value)
		return nil
	})
	return mac, state, err
}
