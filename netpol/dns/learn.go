// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// releaseSlack is added to a lease for the way of the answer to the client,
// which counts its TTL from there.
const releaseSlack = time.Second

// errFull says that no lease can make way for a new one.
var errFull = errors.New("too many addresses are in use")

// offer is what a name resolved to and the policy gives, before it is learned.
type offer struct {
	name  string
	addrs []netip.Addr // in the order of the answer, each once
	steps [][]netpol.PortRule
	life  time.Duration
}

// learn takes an offer into the journal, the kernel and the state, in this
// order, and answers the addresses that may be released. After an error all is
// as before, but that old leases may have ended. sb.mu is held.
func (sb *sandbox) learn(now time.Time, o offer) ([]netip.Addr, error) {
	o, err := sb.makeRoom(o)
	if err != nil {
		return nil, err
	}
	expires := now.Add(o.life + releaseSlack)
	rec := record{Name: o.name, Seen: now.UnixMilli(), Addrs: o.addrs}
	merged := make([]netpol.Learned, len(o.addrs))
	for i, a := range o.addrs {
		p := pair{o.name, a}
		until, less := expires, map[pair]bool(nil)
		if old := sb.st.find(p); old != nil {
			if old.expires.After(until) {
				until = old.expires
			}
			if old.give != giveKey(o.steps[i]) {
				less = map[pair]bool{p: true}
			}
		}
		steps, err := sb.st.merged(a, o.steps[i], less)
		if err != nil {
			return nil, fmt.Errorf("%s with its other names: %w", a, err)
		}
		merged[i] = netpol.Learned{Addr: a, Steps: steps}
		rec.Expires = append(rec.Expires, until.UnixMilli())
	}
	if err := sb.jr.append(sb.st, rec); err != nil {
		return nil, err
	}
	for i, l := range merged {
		if err := sb.cfg.Table.Learn(sb.id, sb.slot, sb.prog.Digest, l); err != nil {
			sb.undo(o.addrs[:i+1])
			return nil, fmt.Errorf("learn %s: %w", l.Addr, err)
		}
	}
	for i, a := range o.addrs {
		sb.st.put(pair{o.name, a}, lease{expires: expires, seen: now}, o.steps[i])
		sb.st.addrs[a].dirty = false
	}
	if sb.check.IsZero() || expires.Before(sb.check) {
		sb.check = expires
	}
	return o.addrs, nil
}

// undo puts the kernel and the journal back to the state.
func (sb *sandbox) undo(addrs []netip.Addr) {
	for _, a := range addrs {
		if err := sb.restore(a, nil); err != nil {
			sb.dirty(a)
			sb.cfg.Log.Warn("a learned address is not what it should be", "sandbox", sb.id, "addr", a, "err", err)
		}
	}
	if err := sb.jr.rewrite(sb.st); err != nil {
		sb.cfg.Log.Warn("resolver's journal is behind", "sandbox", sb.id, "err", err)
	}
}

// dirty marks an address that the kernel may hold otherwise, to be put right
// soon.
func (sb *sandbox) dirty(a netip.Addr) {
	if sb.st.addrs[a] == nil {
		sb.st.addrs[a] = &address{leases: map[string]*lease{}, gives: map[string]*give{}}
	}
	sb.st.addrs[a].dirty = true
	if at := time.Now().Add(retryAfter); sb.check.IsZero() || at.Before(sb.check) {
		sb.check = at
	}
}

// restore makes the kernel hold what the state gives at an address without
// some leases.
func (sb *sandbox) restore(a netip.Addr, less map[pair]bool) error {
	steps, err := sb.st.merged(a, nil, less)
	if err != nil {
		return err
	}
	if len(steps) == 0 {
		return sb.cfg.Table.Forget(sb.id, sb.slot, a)
	}
	return sb.cfg.Table.Learn(sb.id, sb.slot, sb.prog.Digest, netpol.Learned{Addr: a, Steps: steps})
}

// endLeases ends leases: in the journal, in the kernel, in the state. Those
// that could not end in the kernel stay. Addresses that are not as they should
// be are put right on the way. sb.mu is held.
func (sb *sandbox) endLeases(due map[pair]bool) error {
	byName, touched := map[string][]netip.Addr{}, map[netip.Addr][]pair{}
	for p := range due {
		byName[p.name] = append(byName[p.name], p.addr)
		touched[p.addr] = append(touched[p.addr], p)
	}
	recs := make([]record, 0, len(byName))
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		recs = append(recs, ends(name, byName[name]))
	}
	if err := sb.jr.append(sb.st, recs...); err != nil {
		return err
	}
	for a, one := range sb.st.addrs {
		if one.dirty && touched[a] == nil {
			touched[a] = []pair{}
		}
	}
	var errs []error
	for a, pairs := range touched {
		if err := sb.restore(a, due); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", a, err))
			if len(pairs) > 0 {
				sb.jr.stale = true // it says that they ended
			}
			sb.dirty(a)
			continue
		}
		sb.st.addrs[a].dirty = false
		for _, p := range pairs {
			sb.st.remove(p)
		}
		if one := sb.st.addrs[a]; one != nil && len(one.leases) == 0 {
			delete(sb.st.addrs, a)
		}
	}
	return errors.Join(errs...)
}

// room is how many more a sandbox may hold.
type room struct{ ofName, addrs, leases int }

func (sb *sandbox) room(name string) room {
	return room{
		ofName: sb.cfg.AddrsPerName - len(sb.st.names[name]),
		addrs:  sb.cfg.AddrsPerSandbox - len(sb.st.addrs),
		leases: 4*sb.cfg.AddrsPerSandbox - sb.st.leases,
	}
}

// take answers whether an address has room, and uses it up.
func (r *room) take(isLease, isAddr bool) bool {
	if isLease {
		return true
	}
	if r.ofName <= 0 || r.leases <= 0 || !isAddr && r.addrs <= 0 {
		return false
	}
	r.ofName--
	r.leases--
	if !isAddr {
		r.addrs--
	}
	return true
}

// makeRoom ends old leases until an offer fits, and cuts from the offer what
// does not fit all the same. errFull if that is all of it.
func (sb *sandbox) makeRoom(o offer) (offer, error) {
	r := sb.room(o.name)
	fits := true
	for _, a := range o.addrs {
		fits = r.take(sb.st.find(pair{o.name, a}) != nil, sb.st.addrs[a] != nil) && fits
	}
	if fits {
		return o, nil
	}
	if err := sb.evict(o); err != nil {
		return o, fmt.Errorf("end old leases: %w", err)
	}
	r = sb.room(o.name)
	cut := offer{name: o.name, life: o.life}
	for i, a := range o.addrs {
		if r.take(sb.st.find(pair{o.name, a}) != nil, sb.st.addrs[a] != nil) {
			cut.addrs = append(cut.addrs, a)
			cut.steps = append(cut.steps, o.steps[i])
		}
	}
	if len(cut.addrs) == 0 {
		return o, fmt.Errorf("%w (%d of the name, %d of the sandbox)", errFull, len(sb.st.names[o.name]), len(sb.st.addrs))
	}
	return cut, nil
}

// evict ends the oldest leases that nothing uses, as many as an offer needs.
func (sb *sandbox) evict(o offer) error {
	used, err := sb.cfg.Table.Learned(sb.id, sb.slot)
	if err != nil {
		return fmt.Errorf("list learned addresses: %w", err)
	}
	want := map[netip.Addr]bool{}
	r := sb.room(o.name)
	for _, a := range o.addrs {
		want[a] = true
		if sb.st.find(pair{o.name, a}) != nil {
			continue
		}
		r.ofName--
		r.leases--
		if sb.st.addrs[a] == nil {
			r.addrs--
		}
	}
	due := map[pair]bool{}
	left := map[netip.Addr]int{} // leases of an address that are not due
	for a, one := range sb.st.addrs {
		left[a] = len(one.leases)
	}
	type share struct {
		addr netip.Addr
		give string
	}
	ended := map[share]int{}
	// redundant: the address gives the same without the lease.
	redundant := func(p pair) bool {
		a := sb.st.addrs[p.addr]
		give := a.leases[p.name].give
		return a.gives[give].names-ended[share{p.addr, give}] > 1
	}
	end := func(p pair) {
		due[p] = true
		ended[share{p.addr, sb.st.find(p).give}]++
		r.leases++
		if p.name == o.name {
			r.ofName++
		}
		if left[p.addr]--; left[p.addr] == 0 {
			r.addrs++
		}
	}
	for _, e := range sb.st.byAge() {
		p := e.pair
		idle := sb.busy(used, p.addr) == 0
		switch {
		case r.ofName >= 0 && r.addrs >= 0 && r.leases >= 0:
			// Enough.
		case due[p] || want[p.addr] && p.name == o.name:
			// Gone already, or asked for just now.
		case r.ofName < 0 && p.name == o.name && idle:
			end(p)
		case r.addrs < 0 && idle && !want[p.addr]:
			for name := range sb.st.addrs[p.addr].leases {
				if q := (pair{name, p.addr}); !due[q] {
					end(q)
				}
			}
		case r.leases < 0 && (idle && !want[p.addr] || redundant(p)):
			end(p)
		}
	}
	if len(due) == 0 {
		return nil
	}
	gone := make([]netip.Addr, 0, len(due))
	for p := range due {
		gone = append(gone, p.addr)
	}
	slices.SortFunc(gone, netip.Addr.Compare)
	gone = slices.Compact(gone)
	if err := sb.endLeases(due); err != nil {
		return err
	}
	sb.n.evicted.Add(uint64(len(due)))
	sb.later = append(sb.later, Event{
		Name: o.name, Outcome: OutcomeEvicted, Rule: -1, Addrs: gone,
		Detail: fmt.Sprintf("%d old leases gave way", len(due)),
	})
	return nil
}
