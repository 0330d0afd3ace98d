// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// ruleset is what this process knows of the table.
type ruleset struct {
	mu   sync.Mutex
	rd   *conn             // reads; has a lock of its own
	pub  map[string][]Port // +checklocks:mu; published ports by sandbox
	made []fact            // +checklocks:mu; the rules as the kernel gave them back when they were made
	// good is the kernel's generation of all rules at which the table was
	// last found right; 0 is none.
	good uint32 // +checklocks:mu
	// timeouts are those that the kernel was given.
	timeouts tcpTimeouts // +checklocks:mu
}

// Restore makes the table again what Open made it, published ports included,
// in one transaction. It repairs what VerifyTable found; counters go on
// unless the chains themselves had to be made anew.
func (m *Manager) Restore() error {
	if err := enableForwarding(m.cfg.LinkPrefix); err != nil {
		return err
	}
	m.rules.mu.Lock()
	defer m.rules.mu.Unlock()
	return m.installTable()
}

// found is what there is of the table.
type found struct {
	table  *nftables.Table
	chains []*nftables.Chain
	sets   []*nftables.Set
}

// findTable reads the table's outline; found.table is nil if there is none.
func (m *Manager) findTable() (found, error) {
	c := &nftables.Conn{}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return found{}, fmt.Errorf("list nftables tables: %w", err)
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == m.cfg.Table })
	if i < 0 {
		return found{}, nil
	}
	f := found{table: tables[i]}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return found{}, fmt.Errorf("list nftables chains: %w", err)
	}
	for _, h := range chains {
		if h.Table.Name == m.cfg.Table {
			f.chains = append(f.chains, h)
		}
	}
	if f.sets, err = c.GetSets(f.table); err != nil {
		return found{}, fmt.Errorf("list sets of table inet %s: %w", m.cfg.Table, err)
	}
	return f, nil
}

// difference names the first way in which the outline is not what is wanted,
// "" if there is none. missing says whether parts that are not there count.
func (f found) difference(want []chain, sets []*nftables.Set, missing bool) string {
	if f.table == nil {
		if missing {
			return "there is no table"
		}
		return ""
	}
	for _, h := range f.chains {
		i := slices.IndexFunc(want, func(c chain) bool { return c.spec.Name == h.Name })
		if i < 0 {
			return "chain " + h.Name + " is not ours"
		}
		if d := chainDifference(h, want[i].spec); d != "" {
			return d
		}
	}
	for _, h := range f.sets {
		i := slices.IndexFunc(sets, func(s *nftables.Set) bool { return s.Name == h.Name })
		if i < 0 {
			return "set " + h.Name + " is not ours"
		}
		if !sameSet(h, sets[i]) {
			return "set " + h.Name + " is of another kind"
		}
	}
	if !missing {
		return ""
	}
	for _, c := range want {
		if !slices.ContainsFunc(f.chains, func(h *nftables.Chain) bool { return h.Name == c.spec.Name }) {
			return "chain " + c.spec.Name + " is missing"
		}
	}
	for _, s := range sets {
		if !slices.ContainsFunc(f.sets, func(h *nftables.Set) bool { return h.Name == s.Name }) {
			return "set " + s.Name + " is missing"
		}
	}
	return ""
}

func chainDifference(h, want *nftables.Chain) string {
	switch {
	case want.Hooknum == nil && h.Hooknum == nil:
		return ""
	case h.Type != want.Type, h.Hooknum == nil, h.Priority == nil:
		return fmt.Sprintf("chain %s is of type %q, want %q", h.Name, h.Type, want.Type)
	case *h.Hooknum != *want.Hooknum:
		return fmt.Sprintf("chain %s is at hook %d, want %d", h.Name, *h.Hooknum, *want.Hooknum)
	case *h.Priority != *want.Priority:
		return fmt.Sprintf("chain %s has priority %d, want %d", h.Name, *h.Priority, *want.Priority)
	case h.Policy == nil || *h.Policy != *want.Policy:
		return fmt.Sprintf("chain %s has another policy", h.Name)
	}
	return ""
}

func sameSet(a, b *nftables.Set) bool {
	return a.KeyType.Name == b.KeyType.Name && a.IsMap == b.IsMap && a.DataType.Name == b.DataType.Name &&
		a.Dynamic == b.Dynamic && a.HasTimeout == b.HasTimeout && a.Size == b.Size &&
		!a.Interval && !a.Constant
}

// installTable makes the table what chains and sets say, in one transaction.
// Chains that exist keep their hooks: replacing a whole table would leave an
// instant in which a packet passes the new chain before its rules count and
// the old chain after its rules stopped counting.
//
// +checklocks:m.rules.mu
func (m *Manager) installTable() error {
	have, err := m.findTable()
	if err != nil {
		return err
	}
	t := m.table()
	want, sets := m.chains(t), m.sets(t)
	m.rules.good = 0
	tx := &nftables.Conn{}
	if have.difference(want, sets, false) != "" {
		tx.DelTable(t) // made by another version, or by hand; only a new table will do
		have = found{}
	}
	tx.AddTable(t) // without flags: a table that was put to sleep wakes
	for _, h := range have.chains {
		tx.FlushChain(h) // now, so that no rule holds an object or a chain that changes
	}
	if err := m.addCounters(tx, have.table != nil); err != nil {
		return err
	}
	if err := m.addTimeouts(tx, have.table != nil); err != nil {
		return err
	}
	for _, s := range sets {
		if err := tx.AddSet(s, nil); err != nil {
			return fmt.Errorf("set %s: %w", s.Name, err)
		}
	}
	for _, s := range sides {
		for _, b := range bounds {
			tx.FlushSet(m.namedSet(t, b.opening+s.suffix)) // its elements may have another limit
		}
	}
	if err := m.refillPublished(tx, t); err != nil {
		return err
	}
	if err := m.noteLinks(tx, t); err != nil {
		return err
	}
	for _, c := range want {
		tx.AddChain(c.spec)
		for _, r := range c.rules {
			tx.AddRule(&nftables.Rule{Table: t, Chain: c.spec, Exprs: r.exprs, UserData: r.userData()})
		}
	}
	if err := tx.Flush(); err != nil {
		return fmt.Errorf("install nftables table inet %s: %w", t.Name, err)
	}
	m.rules.made, err = m.rules.rd.ruleFacts(t.Name)
	return err
}

// addCounters adds the counters that are missing to the transaction: to
// write one that is there would set it to zero.
func (m *Manager) addCounters(tx *nftables.Conn, tableExists bool) error {
	have := map[string]expr.Counter{}
	if tableExists {
		var err error
		if have, err = m.counters(); err != nil {
			return err
		}
	}
	for _, name := range counterNames {
		if _, ok := have[name]; !ok {
			tx.AddObj(&nftables.NamedObj{Table: m.table(), Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
		}
	}
	return nil
}

// Purge removes the table, NAT, caps, published ports and second layer with
// it. Links stay.
func (m *Manager) Purge() error {
	m.rules.mu.Lock()
	defer m.rules.mu.Unlock()
	have, err := m.findTable()
	if err != nil || have.table == nil {
		return err
	}
	m.rules.good = 0
	clear(m.rules.pub)
	tx := &nftables.Conn{}
	tx.DelTable(m.table())
	if err := tx.Flush(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove nftables table inet %s: %w", m.cfg.Table, err)
	}
	return nil
}

// SecondLayerDrops answers what the second layer caught since the table was
// made: packets from sandbox links that bore no mark, or that bore one and
// went to the host or to another sandbox. The egress program should have
// dropped every one of them; a growing number means that a link runs without
// its program, or that the program is wrong. Dropped answers, capped
// connections and unsolicited packets are not in it.
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
	all := map[string]expr.Counter{}
	objs, err := m.rules.rd.objects(m.cfg.Table, unix.NFT_OBJECT_COUNTER)
	for _, o := range objs {
		if all[o.name], err = parseCounter(o.data); err != nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("read counters of table inet %s: %w", m.cfg.Table, err)
	}
	return all, nil
}
