// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// What a token bucket holds when it is full: the time of burstBytes at its
// rate, so that the largest packets fit at any speed, and at least burstNs, or
// the clock of the programs, which moves some milliseconds at a time, would
// show.
const (
	burstNs    = 50e6
	burstBytes = 128 << 10
	costShift  = 20 // of bh_rate.cost
)

// limitKey names a bucket or a budget. The kernel object keeps it, so that it
// is found again after a restart.
type limitKey struct {
	slot uint32 // of the sandbox that owns it; 0: a tenant
	text string // ownerText
}

// ownerText is what bh_rate.text and bh_budget.text hold: tenant, rule and bits
// a second with zeros between. rule is "" if it is no rule's own, bits 0 of a
// budget. Names that do not fit give way to their digest.
func ownerText(tenant, rule string, bits uint64) string {
	speed := "\x00" + strconv.FormatUint(bits, 10)
	text := tenant + "\x00" + rule
	if len(text)+len(speed) > len(bpf.DatapathBhRate{}.Text) {
		sum := sha256.Sum256([]byte(text))
		text = "\x00" + hex.EncodeToString(sum[:])
	}
	return text + speed
}

// owner is the inverse of ownerText. For names that did not fit it answers
// their digest as the rule and no tenant.
func owner(text string) (tenant, rule string, bits uint64, err error) {
	part := strings.Split(text, "\x00")
	if len(part) != 3 {
		return "", "", 0, fmt.Errorf("owner %q has %d parts, want 3", text, len(part))
	}
	if bits, err = strconv.ParseUint(part[2], 10, 64); err != nil {
		return "", "", 0, fmt.Errorf("owner %q: speed: %w", text, err)
	}
	return part[0], part[1], bits, nil
}

// limitNames is who a limit belongs to in words.
type limitNames struct {
	tenant, rule string
	bits         uint64
}

// limitIDs is which buckets and budgets the program of one sandbox uses. Each
// is held: what nobody holds any more is given to others.
type limitIDs struct {
	rates, budgets []uint32 // of the whole policy, for its head
	byRule         []uint32 // bucket by rule id, 0 none
}

// limited is bh_port_rule.limited of every step of the program.
func (l limitIDs) limited() uint16 {
	if len(l.rates)+len(l.budgets) > 0 {
		return 1
	}
	return 0
}

// limitTable gives out token buckets and budgets.
//
// A bucket never changes its speed: another speed is another bucket, so that
// preparing a policy changes nothing that is in force. One that no policy holds
// is free. A budget that no policy holds stays, with what was spent, until its
// sandbox is detached or its place is needed.
type limitTable struct {
	mu      sync.Mutex
	rates   limitPool
	budgets limitPool

	rate   shared[bpf.DatapathBhRate]   // fields other than tat: +checklocks:mu
	budget shared[bpf.DatapathBhBudget] // fields other than left: +checklocks:mu
}

// limitPool keeps count of the objects of one kind.
type limitPool struct {
	what string
	ids  map[limitKey]uint32   // those that can be found
	keys map[uint32]limitKey   // of ids that are not free, disowned ones too
	name map[uint32]limitNames // of ids whose names are known
	refs map[uint32]int        // policies that hold it
	free []uint32
}

func newLimitPool(what string) limitPool {
	return limitPool{
		what: what, ids: map[limitKey]uint32{}, keys: map[uint32]limitKey{},
		name: map[uint32]limitNames{}, refs: map[uint32]int{},
	}
}

// take gives out a free id under k.
func (p *limitPool) take(k limitKey, names limitNames) (uint32, error) {
	if len(p.free) == 0 {
		return 0, fmt.Errorf("all %ss of the node are in use: raise its number of sandboxes", p.what)
	}
	id := p.free[len(p.free)-1]
	p.free = p.free[:len(p.free)-1]
	p.ids[k], p.keys[id], p.name[id] = id, k, names
	return id, nil
}

// add takes up an id that the kernel has.
func (p *limitPool) add(id uint32, k limitKey, names limitNames) {
	p.ids[k], p.keys[id] = id, k
	if names.tenant != "" {
		p.name[id] = names
	}
}

// disown makes the objects of slot n unfindable and answers their ids.
func (p *limitPool) disown(n uint32) (ids []uint32) {
	for k, id := range p.ids {
		if k.slot == n {
			delete(p.ids, k)
			ids = append(ids, id)
		}
	}
	return ids
}

// drop gives back an id.
func (p *limitPool) drop(id uint32) {
	k := p.keys[id]
	if p.ids[k] == id {
		delete(p.ids, k)
	}
	delete(p.keys, id)
	delete(p.name, id)
	delete(p.refs, id)
	p.free = append(p.free, id)
}

// gcra answers cost and burst of a bucket: ns of one byte times 2^20, and ns.
// A cost is never 0; at 1 a byte takes 2^-20 ns, and nothing is limited.
func gcra(rate uint64) (cost, burst uint64) {
	// 8e9 << 20 fits, so does the burst at the lowest rate: 131 s.
	cost = max((8e9<<costShift)/rate, 1)
	hi, lo := bits.Mul64(cost, burstBytes)
	return cost, max(hi<<(64-costShift)|lo>>costShift, burstNs)
}

// limitsFor answers the buckets and budgets of p for the sandbox in slot n, and
// takes hold of each once for this policy. Those that do not exist yet are
// made: buckets full, budgets with nothing left. On error nothing is made or
// held. The caller holds the slot's lock.
func (e *Enforcer) limitsFor(n uint32, p netpol.Program) (l limitIDs, err error) {
	t := &e.limits
	t.mu.Lock()
	defer t.mu.Unlock()
	defer func() {
		if err != nil {
			t.release(l)
			l = limitIDs{}
		}
	}()
	for _, r := range p.Rates {
		id, err := t.holdRate(ownerSlot(r.Scope, n), limitNames{r.Tenant, "", r.Bits})
		if err != nil {
			return l, fmt.Errorf("rate %s of %s: %w", r.Scope, r.Tenant, err)
		}
		l.rates = append(l.rates, id)
	}
	for _, b := range p.Budgets {
		id, err := t.holdBudget(ownerSlot(b.Scope, n), b.Tenant)
		if err != nil {
			return l, fmt.Errorf("budget %s of %s: %w", b.Scope, b.Tenant, err)
		}
		l.budgets = append(l.budgets, id)
	}
	l.byRule = make([]uint32, len(p.Rules))
	for i, r := range p.Rules {
		if r.Rate == 0 {
			continue
		}
		if l.byRule[i], err = t.holdRate(n, limitNames{r.Tenant, r.Name, r.Rate}); err != nil {
			return l, fmt.Errorf("rate of rule %s of %s: %w", r.Name, r.Tenant, err)
		}
	}
	if most := len(bpf.DatapathBhHead{}.Rates); len(l.rates) > most || len(l.budgets) > most {
		return l, fmt.Errorf("%d rates and %d budgets, at most %d of each", len(l.rates), len(l.budgets), most)
	}
	return l, nil
}

// ownerSlot is the slot of the owner of a limit of the sandbox in slot n.
func ownerSlot(s netpol.Scope, n uint32) uint32 {
	if s == netpol.ScopeSandbox {
		return n
	}
	return 0
}

// holdRate finds or makes a bucket.
//
// +checklocks:t.mu
func (t *limitTable) holdRate(slot uint32, names limitNames) (uint32, error) {
	if names.bits == 0 {
		return 0, errors.New("0 bits a second")
	}
	k := limitKey{slot, ownerText(names.tenant, names.rule, names.bits)}
	id, ok := t.rates.ids[k]
	if !ok {
		var err error
		if id, err = t.rates.take(k, names); err != nil {
			return 0, err
		}
		r := &t.rate.values[id]
		r.Cost, r.Burst = gcra(names.bits)
		r.Slot, r.Len, r.Text = slot, uint16(len(k.text)), [len(r.Text)]uint8{}
		copy(r.Text[:], k.text)
		atomic.StoreUint64(&r.Tat, 0)
		r.Used = 1 // last: a crash leaves it free or whole
	}
	t.rates.name[id] = names
	t.rates.refs[id]++
	return id, nil
}

// holdBudget finds or makes a budget.
//
// +checklocks:t.mu
func (t *limitTable) holdBudget(slot uint32, tenant string) (uint32, error) {
	id, err := t.findBudget(slot, tenant)
	if err == nil {
		t.budgets.refs[id]++
	}
	return id, err
}

// findBudget finds a budget or makes one with nothing left.
//
// +checklocks:t.mu
func (t *limitTable) findBudget(slot uint32, tenant string) (uint32, error) {
	k := limitKey{slot, ownerText(tenant, "", 0)}
	id, ok := t.budgets.ids[k]
	if ok {
		t.budgets.name[id] = limitNames{tenant: tenant}
		return id, nil
	}
	if len(t.budgets.free) == 0 {
		t.evictBudget()
	}
	id, err := t.budgets.take(k, limitNames{tenant: tenant})
	if err != nil {
		return 0, err
	}
	b := &t.budget.values[id]
	b.Slot, b.Len, b.Text = slot, uint16(len(k.text)), [len(b.Text)]uint8{}
	copy(b.Text[:], k.text)
	setWindow(b, 0, 0, 0)
	b.Used = 1 // last: a crash leaves it free or whole
	return id, nil
}

// evictBudget frees the budget of the oldest window among those that no policy
// holds, if there is one.
//
// +checklocks:t.mu
func (t *limitTable) evictBudget() {
	oldest, found := uint32(0), false
	for id := range t.budgets.keys {
		if t.budgets.refs[id] > 0 {
			continue
		}
		if !found || windowOf(&t.budget.values[id]) < windowOf(&t.budget.values[oldest]) {
			oldest, found = id, true
		}
	}
	if found {
		t.dropBudget(oldest)
	}
}

// +checklocks:t.mu
func (t *limitTable) dropRate(id uint32) {
	t.rate.values[id].Used = 0
	t.rates.drop(id)
}

// +checklocks:t.mu
func (t *limitTable) dropBudget(id uint32) {
	t.budget.values[id].Used = 0
	t.budgets.drop(id)
}

// releaseLimits lets go of what limitsFor took hold of for one policy, once no
// program can use it any more. The zero value is fine.
func (e *Enforcer) releaseLimits(l limitIDs) {
	e.limits.mu.Lock()
	defer e.limits.mu.Unlock()
	e.limits.release(l)
}

// release lets go of each object in l once.
//
// +checklocks:t.mu
func (t *limitTable) release(l limitIDs) {
	for _, id := range slices.Concat(l.rates, l.byRule) {
		if id == 0 {
			continue
		}
		if t.rates.refs[id]--; t.rates.refs[id] <= 0 {
			t.dropRate(id)
		}
	}
	for _, id := range l.budgets {
		if t.budgets.refs[id]--; t.budgets.refs[id] > 0 {
			continue
		}
		delete(t.budgets.refs, id)
		if t.budgets.ids[t.budgets.keys[id]] != id { // disowned
			t.dropBudget(id)
		}
	}
}

// disownLimits makes sure that the next sandbox in slot n does not find what
// this one had. What its retired policies still hold goes with them.
func (e *Enforcer) disownLimits(n uint32) {
	t := &e.limits
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, id := range t.rates.disown(n) {
		t.rate.values[id].Used = 0
	}
	for _, id := range t.budgets.disown(n) {
		t.budget.values[id].Used = 0
		if t.budgets.refs[id] == 0 {
			t.dropBudget(id)
		}
	}
}

// loadLimits takes up the buckets and budgets that an earlier process made and
// holds them for the policies that name them: slot.limits of every slot in use.
// Those of sandboxes that are gone are freed, and buckets that nobody holds.
func (e *Enforcer) loadLimits() (err error) {
	t := &e.limits
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rates, t.budgets = newLimitPool("rate limit"), newLimitPool("budget")
	if t.rate, err = mapShared[bpf.DatapathBhRate](e.maps["rates"], e.maps["rates"].MaxEntries()); err != nil {
		return err
	}
	if t.budget, err = mapShared[bpf.DatapathBhBudget](e.maps["budgets"], e.maps["budgets"].MaxEntries()); err != nil {
		return err
	}
	if err := e.holdHeads(); err != nil {
		return err
	}
	for id := uint32(len(t.rate.values)) - 1; id > 0; id-- {
		if err := e.loadRate(id); err != nil {
			return fmt.Errorf("rate limit %d: %w", id, err)
		}
	}
	for id := uint32(len(t.budget.values)) - 1; id > 0; id-- {
		if err := e.loadBudget(id); err != nil {
			return fmt.Errorf("budget %d: %w", id, err)
		}
	}
	return nil
}

// holdHeads holds what the heads of the policies in force name.
//
// +checklocks:e.limits.mu
func (e *Enforcer) holdHeads() error {
	t := &e.limits
	for n := uint32(1); n <= e.cfg.MaxSandboxes; n++ {
		policy := e.shm.policy(n)
		if e.slots[n].id == "" || policy == 0 {
			continue
		}
		var head bpf.DatapathBhHead
		if err := e.maps["heads"].Lookup(policy, &head); err != nil {
			return fmt.Errorf("read limits of policy %d: %w", policy, err)
		}
		l := &e.slots[n].limits
		for _, id := range head.Rates {
			if id != 0 && int(id) < len(t.rate.values) {
				t.rates.refs[id]++
				l.rates = append(l.rates, id)
			}
		}
		for _, id := range head.Budgets {
			if id != 0 && int(id) < len(t.budget.values) {
				t.budgets.refs[id]++
				l.budgets = append(l.budgets, id)
			}
		}
	}
	return nil
}

// loadRate takes up one bucket, or finds it free. Which of them the rules of a
// policy name is not known before the policy is; until then the sandbox holds
// all that its rules have had.
//
// +checklocks:e.limits.mu
func (e *Enforcer) loadRate(id uint32) error {
	t := &e.limits
	r := &t.rate.values[id]
	if r.Used != 0 && int(r.Len) <= len(r.Text) {
		k := limitKey{r.Slot, string(r.Text[:r.Len])}
		tenant, rule, bits, err := owner(k.text)
		if err != nil {
			return err
		}
		if k.slot != 0 && rule != "" && e.holdsSlot(k.slot) {
			t.rates.refs[id]++
			l := &e.slots[k.slot].limits
			l.byRule = append(l.byRule, id)
		}
		if t.rates.refs[id] > 0 {
			t.rates.add(id, k, limitNames{tenant, rule, bits})
			return nil
		}
	}
	if t.rates.refs[id] == 0 {
		r.Used = 0
		t.rates.free = append(t.rates.free, id)
	}
	return nil
}

// loadBudget takes up one budget, or finds it free.
//
// +checklocks:e.limits.mu
func (e *Enforcer) loadBudget(id uint32) error {
	t := &e.limits
	b := &t.budget.values[id]
	if b.Used != 0 && int(b.Len) <= len(b.Text) && (b.Slot == 0 || e.holdsSlot(b.Slot)) {
		k := limitKey{b.Slot, string(b.Text[:b.Len])}
		tenant, _, _, err := owner(k.text)
		if err != nil {
			return err
		}
		if b.Reserved != 0 { // a crash while its window was set
			setWindow(b, 0, 0, 0)
		}
		t.budgets.add(id, k, limitNames{tenant: tenant})
		return nil
	}
	if t.budgets.refs[id] == 0 {
		b.Used = 0
		t.budgets.free = append(t.budgets.free, id)
	}
	return nil
}

// holdsSlot tells whether slot n has a sandbox.
func (e *Enforcer) holdsSlot(n uint32) bool {
	return n <= e.cfg.MaxSandboxes && e.shm.id(n) != ""
}

// closeLimits gives up shared memory.
func (e *Enforcer) closeLimits() error {
	e.limits.mu.Lock()
	defer e.limits.mu.Unlock()
	return errors.Join(e.limits.rate.close(), e.limits.budget.close())
}

// RateState is one token bucket that a sandbox's packets go through.
type RateState struct {
	Tenant, Rule string // who set it; Rule is "" if it is for all rules
	Scope        netpol.Scope
	Bits         uint64  // a second
	Full         float64 // of the burst in use now: 0 nothing, 1 all, packets are being dropped
}

// Rates reads the buckets of a sandbox, those of its tenants among them, sorted
// by tenant, rule and scope.
func (e *Enforcer) Rates(id string, slot uint32) ([]RateState, error) {
	if err := e.use(); err != nil {
		return nil, err
	}
	defer e.life.RUnlock()
	s, err := e.lockSlot(id, slot)
	if err != nil {
		return nil, fmt.Errorf("read rates of %s: %w", id, err)
	}
	defer s.mu.Unlock()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &now); err != nil {
		return nil, fmt.Errorf("read rates of %s: read clock: %w", id, err)
	}
	t := &e.limits
	t.mu.Lock()
	defer t.mu.Unlock()
	ids := map[uint32]bool{}
	for _, id := range slices.Concat(s.limits.rates, s.limits.byRule) {
		ids[id] = id != 0
	}
	var out []RateState
	for id := range maps.Keys(ids) {
		names, known := t.rates.name[id]
		if !ids[id] || !known {
			continue
		}
		r := &t.rate.values[id]
		state := RateState{Tenant: names.tenant, Rule: names.rule, Bits: names.bits}
		if r.Slot != 0 {
			state.Scope = netpol.ScopeSandbox
		}
		if tat := atomic.LoadUint64(&r.Tat); tat > uint64(now.Nano()) {
			state.Full = min(float64(tat-uint64(now.Nano()))/float64(r.Burst), 1)
		}
		out = append(out, state)
	}
	slices.SortFunc(out, func(a, b RateState) int {
		return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Scope, b.Scope))
	})
	return out, nil
}
