// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Port lets connections to a port of the host reach a port of a sandbox.
type Port struct {
	Host, Sandbox uint16
	Proto         uint8 // IPPROTO_TCP or IPPROTO_UDP
}

// ErrPortTaken means that another sandbox has published a host port.
var ErrPortTaken = errors.New("host port is published by another sandbox")

func (p Port) String() string {
	proto := "tcp"
	if p.Proto == unix.IPPROTO_UDP {
		proto = "udp"
	}
	return fmt.Sprintf("%d:%d/%s", p.Host, p.Sandbox, proto)
}

// hostPort is what only one sandbox can have.
type hostPort struct {
	port  uint16
	proto uint8
}

func (p Port) hostPort() hostPort { return hostPort{p.Host, p.Proto} }

// Publish makes exactly these the published ports of a sandbox, in one
// transaction; none closes all. ErrNotFound if there is no such link,
// ErrPortTaken if another sandbox has one of the host ports.
//
// Connections from elsewhere to a port on any of the host's addresses, of
// either family, then reach the sandbox, and it sees who they come from. A
// port that is no longer published is cut with the next packet that comes in,
// flows that are under way too. Not reachable this way: the host's own
// processes, for which the port is that of the host, and sandboxes, which do
// not reach the host at all. The host's own listener on such a port is hidden
// from elsewhere.
//
// What is published outlives the process, and is part of Remove.
func (m *Manager) Publish(id string, ports []Port) error {
	if err := m.publish(id, ports); err != nil {
		return fmt.Errorf("publish ports of %s: %w", id, err)
	}
	return nil
}

func (m *Manager) publish(id string, ports []Port) error {
	ports, err := checkPorts(ports)
	if err != nil {
		return err
	}
	o, ok := m.known(id)
	if !ok {
		return ErrNotFound
	}
	m.rules.mu.Lock()
	defer m.rules.mu.Unlock()
	for other, theirs := range m.rules.pub {
		for _, p := range theirs {
			if other != id && slices.ContainsFunc(ports, func(q Port) bool { return q.hostPort() == p.hostPort() }) {
				return fmt.Errorf("%s: %w (%s)", p, ErrPortTaken, other)
			}
		}
	}
	old := m.rules.pub[id]
	if slices.Equal(old, ports) {
		return nil
	}
	err = m.changeElements(func(tx *nftables.Conn, t *nftables.Table) error {
		return errors.Join(m.deletePublished(tx, t, o, old), m.addPublished(tx, t, o, ports))
	})
	if errors.Is(err, unix.ENOENT) && len(ports) == 0 {
		err = nil // someone took the sets, and the ports with them
	}
	if err != nil {
		return err
	}
	m.setPublished(id, ports)
	return nil
}

// +checklocks:m.rules.mu
func (m *Manager) setPublished(id string, ports []Port) {
	if len(ports) == 0 {
		delete(m.rules.pub, id)
		return
	}
	m.rules.pub[id] = ports
}

func checkPorts(ports []Port) ([]Port, error) {
	seen := map[hostPort]bool{}
	for _, p := range ports {
		switch {
		case p.Host == 0 || p.Sandbox == 0:
			return nil, fmt.Errorf("%s: want ports from 1 to 65535", p)
		case p.Proto != unix.IPPROTO_TCP && p.Proto != unix.IPPROTO_UDP:
			return nil, fmt.Errorf("%d:%d: protocol %d, want TCP or UDP", p.Host, p.Sandbox, p.Proto)
		case seen[p.hostPort()]:
			return nil, fmt.Errorf("%s: the host port is named twice", p)
		}
		seen[p.hostPort()] = true
	}
	ports = slices.Clone(ports)
	slices.SortFunc(ports, comparePorts)
	return ports, nil
}

func comparePorts(a, b Port) int {
	if a.Proto != b.Proto {
		return int(a.Proto) - int(b.Proto)
	}
	return int(a.Host) - int(b.Host)
}

// Published answers, from the kernel, the ports of each sandbox that has any,
// sorted by protocol and host port.
func (m *Manager) Published() (map[string][]Port, error) {
	m.rules.mu.Lock()
	defer m.rules.mu.Unlock()
	have, err := m.findTable()
	if err != nil {
		return nil, err
	}
	byAddr, err := m.readPublished(have)
	if err != nil {
		return nil, err
	}
	return m.byID(byAddr), nil
}

// byID turns addresses into the sandboxes that hold them. What belongs to no
// link is left out.
func (m *Manager) byID(byAddr map[netip.Addr][]Port) map[string][]Port {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := map[string][]Port{}
	for id, o := range m.live {
		if p := byAddr[o.addr4]; len(p) > 0 {
			all[id] = p
		}
	}
	return all
}

// readPublished reads the ports that each IPv4 address has in the kernel. The
// other sets hold the same in other words; VerifyTable compares them.
func (m *Manager) readPublished(have found) (map[netip.Addr][]Port, error) {
	name := setPublished + sides[0].suffix
	want := m.namedSet(m.table(), name)
	if !slices.ContainsFunc(have.sets, func(s *nftables.Set) bool { return s.Name == name && sameSet(s, want) }) {
		return nil, nil // no table, or one of another version
	}
	elems, err := m.elements(name)
	if err != nil {
		return nil, err
	}
	all := map[netip.Addr][]Port{}
	for _, e := range elems {
		if len(e.Key) < 6 || len(e.Val) < 6 {
			return nil, fmt.Errorf("set %s: element % x : % x is too short", name, e.Key, e.Val)
		}
		a := netip.AddrFrom4([4]byte(e.Val))
		all[a] = append(all[a], Port{
			Host: binary.BigEndian.Uint16(e.Key[4:]), Sandbox: binary.BigEndian.Uint16(e.Val[4:]), Proto: e.Key[0],
		})
	}
	for _, p := range all {
		slices.SortFunc(p, comparePorts)
	}
	return all, nil
}

func (m *Manager) elements(set string) ([]nftables.SetElement, error) {
	elems, err := (&nftables.Conn{}).GetSetElements(&nftables.Set{Table: m.table(), Name: set})
	if err != nil {
		return nil, fmt.Errorf("list set %s of table inet %s: %w", set, m.cfg.Table, err)
	}
	return elems, nil
}

// padded is v in network byte order, as wide as a register.
func padded(v uint16) []byte { return append(binary.BigEndian.AppendUint16(nil, v), 0, 0) }

// publishedElements answers what ports add to the sets of one side.
func (s side) publishedElements(addr netip.Addr, ports []Port) map[string][]nftables.SetElement {
	all := map[string][]nftables.SetElement{}
	for _, p := range ports {
		proto := []byte{p.Proto, 0, 0, 0}
		all[setPublished] = append(all[setPublished], nftables.SetElement{
			Key: slices.Concat(proto, padded(p.Host)), Val: slices.Concat(addr.AsSlice(), padded(p.Sandbox)),
		})
		open := slices.Concat(addr.AsSlice(), proto, padded(p.Sandbox))
		if !slices.ContainsFunc(all[setOpen], func(e nftables.SetElement) bool { return string(e.Key) == string(open) }) {
			all[setOpen] = append(all[setOpen], nftables.SetElement{Key: open})
		}
	}
	return all
}

// namedSet answers a set of the table, to change its elements.
func (m *Manager) namedSet(t *nftables.Table, name string) *nftables.Set {
	all := m.sets(t)
	return all[slices.IndexFunc(all, func(s *nftables.Set) bool { return s.Name == name })]
}

func (m *Manager) addPublished(tx *nftables.Conn, t *nftables.Table, o owned, ports []Port) error {
	return m.eachPublished(o, ports, func(set string, elems []nftables.SetElement) error {
		return tx.SetAddElements(m.namedSet(t, set), elems)
	})
}

func (m *Manager) deletePublished(tx *nftables.Conn, t *nftables.Table, o owned, ports []Port) error {
	return m.eachPublished(o, ports, func(set string, elems []nftables.SetElement) error {
		return deleteElements(tx, m.namedSet(t, set), elems)
	})
}

func (m *Manager) eachPublished(o owned, ports []Port, f func(set string, elems []nftables.SetElement) error) error {
	for _, a := range []netip.Addr{o.addr4, o.addr6} {
		s := sideOf(a)
		for name, elems := range s.publishedElements(a, ports) {
			if err := f(name+s.suffix, elems); err != nil {
				return err
			}
		}
	}
	return nil
}

// deleteElements deletes elements, whether they are there or not: adding
// first makes sure that they are, and a transaction is all or nothing.
func deleteElements(tx *nftables.Conn, s *nftables.Set, elems []nftables.SetElement) error {
	return errors.Join(tx.SetAddElements(s, elems), tx.SetDeleteElements(s, elems))
}

// changeElements runs one transaction on sets. A table that was right before
// it is right after it, if nobody else changed any rule meanwhile.
//
// +checklocks:m.rules.mu
func (m *Manager) changeElements(build func(*nftables.Conn, *nftables.Table) error) error {
	before, err := m.rules.rd.generation()
	if err != nil {
		return err
	}
	tx := &nftables.Conn{}
	if err := build(tx, m.table()); err != nil {
		return err
	}
	if err := tx.Flush(); err != nil {
		return fmt.Errorf("change sets of table inet %s: %w", m.cfg.Table, err)
	}
	after, err := m.rules.rd.generation()
	if err != nil {
		return err
	}
	if m.rules.good == before && after == before+1 {
		m.rules.good = after
	}
	return nil
}

// refillPublished adds to the transaction that the published ports are what
// this process knows.
//
// +checklocks:m.rules.mu
func (m *Manager) refillPublished(tx *nftables.Conn, t *nftables.Table) error {
	for _, s := range sides {
		for _, name := range []string{setPublished, setOpen} {
			tx.FlushSet(m.namedSet(t, name+s.suffix))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.rules.pub)) {
		o, ok := m.known(id)
		if !ok {
			continue
		}
		if err := m.addPublished(tx, t, o, m.rules.pub[id]); err != nil {
			return err
		}
	}
	return nil
}
