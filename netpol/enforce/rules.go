// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/bpf"
)

// rulesPerPage is BH_RULES_PER_PAGE.
const rulesPerPage = 4096

// ruleKey names a rule of a sandbox. Its counter goes on for as long as the
// sandbox has had a rule of this name, whatever policies come and go.
type ruleKey struct{ tenant, name string }

// ruleTable gives out hit counters.
type ruleTable struct {
	spec         *ebpf.MapSpec
	pages, names *ebpf.Map

	mu    sync.Mutex
	owner map[uint32]uint32 // +checklocks:mu; slot by counter that has a name
	share map[uint32]int    // +checklocks:mu; counters by slot
	short int               // +checklocks:mu; what all slots lack of rulesPerSandbox
	page  []*ebpf.Map       // +checklocks:mu; open pages by number
	free  []uint32          // +checklocks:mu; below next, given back
	next  uint32            // +checklocks:mu; the first that was never given out
	zero  []bpf.DatapathBhCount
}

// load reads the names that an earlier process wrote, by slot.
func (t *ruleTable) load(slots int) (map[uint32]map[ruleKey]uint32, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("count CPUs: %w", err)
	}
	t.zero = make([]bpf.DatapathBhCount, cpus)
	for n := uint32(0); n < t.pages.MaxEntries(); n++ {
		var page *ebpf.Map
		err := t.pages.Lookup(n, &page)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("open page %d of rule counters: %w", n, err)
		}
		t.page = append(t.page, page)
	}

	t.owner, t.share, t.short = map[uint32]uint32{}, map[uint32]int{}, slots*rulesPerSandbox
	bySlot := map[uint32]map[ruleKey]uint32{}
	var index uint32
	var name bpf.DatapathBhRuleName
	it := t.names.Iterate()
	for it.Next(&index, &name) {
		if int(name.TenantLen)+int(name.NameLen) > len(name.Text) || int(index/rulesPerPage) >= len(t.page) {
			return nil, fmt.Errorf("rule counter %d: name is damaged", index)
		}
		if bySlot[name.Slot] == nil {
			bySlot[name.Slot] = map[ruleKey]uint32{}
		}
		tenant, rest := name.Text[:name.TenantLen], name.Text[name.TenantLen:]
		bySlot[name.Slot][ruleKey{string(tenant), string(rest[:name.NameLen])}] = index
		t.own(index, name.Slot)
		t.next = max(t.next, index+1)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read rule names: %w", err)
	}
	for i := uint32(0); i < t.next; i++ {
		if _, used := t.owner[i]; !used {
			t.free = append(t.free, i)
		}
	}
	return bySlot, nil
}

// own notes whose a counter is.
//
// +checklocks:t.mu
func (t *ruleTable) own(index, slot uint32) {
	t.owner[index] = slot
	if t.share[slot]++; t.share[slot] <= rulesPerSandbox {
		t.short--
	}
}

// disown is the inverse of own.
//
// +checklocks:t.mu
func (t *ruleTable) disown(index uint32) {
	slot, ok := t.owner[index]
	if !ok {
		return
	}
	delete(t.owner, index)
	if t.share[slot]--; t.share[slot] < rulesPerSandbox {
		t.short++
	}
	if t.share[slot] == 0 {
		delete(t.share, slot)
	}
}

// room refuses a slot that has its share already what others may need. A new
// sandbox leaves some of what nobody has a right to, so that the policies of
// those that are there can change.
//
// +checklocks:t.mu
func (t *ruleTable) room(slot uint32, isNew bool) error {
	if t.share[slot] < rulesPerSandbox {
		return nil
	}
	most := int(t.names.MaxEntries())
	if isNew {
		most -= most / 8
	}
	if len(t.owner)+t.short < most {
		return nil
	}
	return fmt.Errorf("the node has no room for more than %d rules of this sandbox: join rules, or raise sandbox.max", t.share[slot])
}

// add gives k a counter, at zero, and writes down whose it is. isNew says that
// the sandbox has no policy yet.
func (t *ruleTable) add(slot uint32, k ruleKey, isNew bool) (uint32, error) {
	name := bpf.DatapathBhRuleName{Slot: slot, TenantLen: uint16(len(k.tenant)), NameLen: uint16(len(k.name))}
	if len(k.tenant)+len(k.name) > len(name.Text) {
		return 0, fmt.Errorf("rule %s of %s: name is too long", k.name, k.tenant)
	}
	copy(name.Text[copy(name.Text[:], k.tenant):], k.name)

	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.room(slot, isNew)
	index := uint32(0)
	if err == nil {
		index, err = t.alloc()
	}
	if err != nil {
		return 0, fmt.Errorf("count rule %s of %s: %w", k.name, k.tenant, err)
	}
	err = t.page[index/rulesPerPage].Put(index%rulesPerPage, t.zero)
	if err == nil {
		err = t.names.Put(index, name)
	}
	if err != nil {
		t.free = append(t.free, index)
		return 0, fmt.Errorf("count rule %s of %s: %w", k.name, k.tenant, err)
	}
	t.own(index, slot)
	return index, nil
}

// alloc answers a counter that nobody uses.
//
// +checklocks:t.mu
func (t *ruleTable) alloc() (uint32, error) {
	if n := len(t.free); n > 0 {
		index := t.free[n-1]
		t.free = t.free[:n-1]
		return index, nil
	}
	if page := t.next / rulesPerPage; int(page) == len(t.page) {
		m, err := ebpf.NewMap(t.spec)
		if err != nil {
			return 0, fmt.Errorf("create page %d of rule counters: %w", page, err)
		}
		if err := t.pages.Put(page, m); err != nil {
			m.Close()
			return 0, fmt.Errorf("add page %d of rule counters: %w", page, err)
		}
		t.page = append(t.page, m)
	}
	t.next++
	return t.next - 1, nil
}

// forget takes the names off counters, which nobody has any more then. They are
// not given out again before recycle.
func (t *ruleTable) forget(rules map[ruleKey]uint32) ([]uint32, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var gone []uint32
	var errs []error
	for k, index := range rules {
		if err := t.names.Delete(index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("forget rule %s of %s: %w", k.name, k.tenant, err))
			continue
		}
		t.disown(index)
		gone = append(gone, index)
	}
	return gone, errors.Join(errs...)
}

// recycle lets forgotten counters be given out again. No program may still
// count there.
func (t *ruleTable) recycle(gone []uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free = append(t.free, gone...)
}

// release gives back counters that no policy in force has named.
func (t *ruleTable) release(rules map[ruleKey]uint32) error {
	gone, err := t.forget(rules)
	t.recycle(gone)
	return err
}

// count reads a counter.
func (t *ruleTable) count(index uint32) (packets, bytes uint64, err error) {
	t.mu.Lock()
	page := t.page[index/rulesPerPage]
	t.mu.Unlock()
	var perCPU []bpf.DatapathBhCount
	if err := page.Lookup(index%rulesPerPage, &perCPU); err != nil {
		return 0, 0, fmt.Errorf("read rule counter %d: %w", index, err)
	}
	for _, c := range perCPU {
		packets += c.Packets
		bytes += c.Bytes
	}
	return packets, bytes, nil
}

func (t *ruleTable) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for _, m := range t.page {
		errs = append(errs, m.Close())
	}
	t.page = nil
	return errors.Join(errs...)
}
