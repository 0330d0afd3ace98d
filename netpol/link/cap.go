// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Capped answers how many packets of a sandbox's new connections were dropped
// because it had Config.MaxConnections already or got more than
// Config.NewConnectionsPerSecond, both families and both directions together,
// since the link was made. ErrNotFound if there is no such link.
//
// A connection is an entry of conntrack that the sandbox began, or that came
// in by a port of its, in use or half open, UDP included; a TCP connection
// counts until it is closed. An attempt too many is dropped, not refused: who
// made it may try again.
func (m *Manager) Capped(id string) (packets uint64, err error) {
	o, ok := m.known(id)
	if !ok {
		return 0, fmt.Errorf("capped connections of %s: %w", id, ErrNotFound)
	}
	for _, a := range []netip.Addr{o.addr4, o.addr6} {
		e, err := m.rules.rd.element(m.cfg.Table, setCapped+sideOf(a).suffix, a)
		if err != nil {
			return 0, fmt.Errorf("capped connections of %s: %w", id, err)
		}
		packets += e.packets
	}
	return packets, nil
}

// notes are the sets that packets add a sandbox's addresses to and nothing
// takes them from. Of those of the bounds, the kernel takes an address out of
// connections with its last connection, and out of the others in time.
var notes = [...]string{setCapped, setSeen}

// inherited are the sets whose elements the next holder of an address must
// not find.
var inherited = [...]string{setCapped, setSeen, begun.resting, begun.opening, reached.resting, reached.opening}

// noted reports whether conntrack may have entries of a sandbox, or the table
// a note. If the rules are as they should be and there is no note, it never
// had a connection: one gets into conntrack only after the forward chain, and
// whenever the rules are made, every link that is there is noted, because
// nobody knows what passed before.
func (m *Manager) noted(o owned) (bool, error) {
	switch err := m.VerifyTable(); {
	case errors.Is(err, ErrDrift):
		return true, nil
	case err != nil:
		return false, err
	}
	for _, a := range []netip.Addr{o.addr4, o.addr6} {
		for _, name := range notes {
			e, err := m.rules.rd.element(m.cfg.Table, name+sideOf(a).suffix, a)
			if err != nil || e.there {
				return e.there, err
			}
		}
	}
	return false, nil
}

// deleteNotes deletes what the sets hold of addresses, connections left out.
// Their links must be gone, or packets may add to them meanwhile.
func (m *Manager) deleteNotes(addrs []netip.Addr) error {
	m.rules.mu.Lock()
	defer m.rules.mu.Unlock()
	err := m.changeElements(func(tx *nftables.Conn, t *nftables.Table) error {
		for _, name := range inherited {
			elems := map[string][]nftables.SetElement{}
			for _, a := range addrs {
				set := name + sideOf(a).suffix
				elems[set] = append(elems[set], nftables.SetElement{Key: a.AsSlice()})
			}
			for set, e := range elems {
				if err := deleteElements(tx, m.namedSet(t, set), e); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return nil // someone took the set, and the notes with it
	}
	return err
}

// noteLinks adds to the transaction that every link may have connections.
func (m *Manager) noteLinks(tx *nftables.Conn, t *nftables.Table) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.live {
		for _, a := range []netip.Addr{o.addr4, o.addr6} {
			set := m.namedSet(t, setSeen+sideOf(a).suffix)
			if err := tx.SetAddElements(set, []nftables.SetElement{{Key: a.AsSlice()}}); err != nil {
				return err
			}
		}
	}
	return nil
}

// sweepNotes deletes the notes of addresses that no link has.
func (m *Manager) sweepNotes(keep map[netip.Addr]bool) error {
	var stale []netip.Addr
	for _, s := range sides {
		for _, name := range notes {
			elems, err := m.elements(name + s.suffix)
			if err != nil {
				return err
			}
			for _, e := range elems {
				if a, ok := netip.AddrFromSlice(e.Key); ok && !keep[a] && !slices.Contains(stale, a) {
					stale = append(stale, a)
				}
			}
		}
	}
	if len(stale) == 0 {
		return nil
	}
	return m.deleteNotes(stale)
}
