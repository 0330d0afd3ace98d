// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// pair names a lease.
type pair struct {
	name string
	addr netip.Addr
}

// lease is one address of one name.
type lease struct {
	expires time.Time
	seen    time.Time // it was last in an answer
	give    string    // key in address.gives
}

// give is what one or more names allow at an address.
type give struct {
	steps []netpol.PortRule
	names int
}

// address is what is known of one address. A CDN's has thousands of names, but
// only as many gives as there are rules that differ.
type address struct {
	leases map[string]*lease // by name
	gives  map[string]*give
	dirty  bool // the kernel may hold something else than the merged steps
}

// state is the leases of a sandbox, by name and by address. It is pure.
type state struct {
	names  map[string]map[netip.Addr]*lease
	addrs  map[netip.Addr]*address
	leases int
}

func newState() *state {
	return &state{names: map[string]map[netip.Addr]*lease{}, addrs: map[netip.Addr]*address{}}
}

// giveKey is equal for steps that are equal.
func giveKey(steps []netpol.PortRule) string {
	b := make([]byte, 0, 9*len(steps))
	for _, s := range steps {
		flags := byte(0)
		if s.Deny {
			flags |= 1
		}
		if s.Audit {
			flags |= 2
		}
		b = binary.BigEndian.AppendUint16(b, s.Lo)
		b = binary.BigEndian.AppendUint16(b, s.Hi)
		b = append(b, byte(s.Proto), flags)
		b = binary.BigEndian.AppendUint16(b, s.Rule)
	}
	return string(b)
}

// put sets a lease. The steps of an earlier one of the same pair are replaced;
// it ends no earlier than that one.
func (s *state) put(p pair, l lease, steps []netpol.PortRule) {
	if old := s.find(p); old != nil {
		if old.expires.After(l.expires) {
			l.expires = old.expires
		}
		s.remove(p)
	}
	l.give = giveKey(steps)
	a := s.addrs[p.addr]
	if a == nil {
		a = &address{leases: map[string]*lease{}, gives: map[string]*give{}}
		s.addrs[p.addr] = a
	}
	g := a.gives[l.give]
	if g == nil {
		g = &give{steps: steps}
		a.gives[l.give] = g
	}
	g.names++
	a.leases[p.name] = &l
	if s.names[p.name] == nil {
		s.names[p.name] = map[netip.Addr]*lease{}
	}
	s.names[p.name][p.addr] = &l
	s.leases++
}

// remove takes a lease out, with its address if that was the last one and the
// kernel is not known to hold more.
func (s *state) remove(p pair) {
	l := s.find(p)
	if l == nil {
		return
	}
	a := s.addrs[p.addr]
	delete(a.leases, p.name)
	if g := a.gives[l.give]; g.names > 1 {
		g.names--
	} else {
		delete(a.gives, l.give)
	}
	if len(a.leases) == 0 && !a.dirty {
		delete(s.addrs, p.addr)
	}
	delete(s.names[p.name], p.addr)
	if len(s.names[p.name]) == 0 {
		delete(s.names, p.name)
	}
	s.leases--
}

func (s *state) find(p pair) *lease { return s.names[p.name][p.addr] }

// merged is what all names of an address give, with one more list if extra is
// not nil and without what only the pairs of less give.
func (s *state) merged(addr netip.Addr, extra []netpol.PortRule, less map[pair]bool) ([]netpol.PortRule, error) {
	lists := map[string][]netpol.PortRule{}
	if a := s.addrs[addr]; a != nil {
		for key, g := range a.gives {
			lists[key] = g.steps
		}
		if len(less) > 0 {
			lists = map[string][]netpol.PortRule{}
			for name, l := range a.leases {
				if !less[pair{name, addr}] {
					lists[l.give] = a.gives[l.give].steps
				}
			}
		}
	}
	if extra != nil {
		lists[giveKey(extra)] = extra
	}
	if len(lists) == 0 {
		return nil, nil
	}
	if len(lists) == 1 {
		for _, steps := range lists {
			if len(steps) <= netpol.MaxLearnedSteps {
				return steps, nil
			}
		}
	}
	ordered := make([][]netpol.PortRule, 0, len(lists))
	for _, key := range slices.Sorted(maps.Keys(lists)) {
		ordered = append(ordered, lists[key])
	}
	return netpol.MergeSteps(ordered...)
}

// under is the state that the same leases give under a program, and the
// leases that have no place in it: the program does not allow the name or the
// address, or an address has more steps than the kernel takes. Of those the
// oldest leases stay.
func (s *state) under(p netpol.Program) (*state, []pair) {
	next := newState()
	var gone []pair
	for _, e := range s.byAge() {
		steps := p.Learn(e.name, e.addr)
		if len(steps) == 0 {
			gone = append(gone, e.pair)
			continue
		}
		if _, err := next.merged(e.addr, steps, nil); err != nil {
			gone = append(gone, e.pair)
			continue
		}
		next.put(e.pair, lease{expires: e.expires, seen: e.seen}, steps)
	}
	return next, gone
}

// unusable says that an address is taken out of every answer, or of those of
// names that may not have private ones.
func unusable(a netip.Addr, private bool) bool {
	return !a.IsValid() || a.Is4In6() || netpol.SpecialUse(a) || !private && netpol.PrivateAddr(a)
}

// aged is a lease with its names, to be sorted.
type aged struct {
	pair
	lease
}

// byAge lists all leases, those that were in no answer for the longest time
// first.
func (s *state) byAge() []aged {
	out := make([]aged, 0, s.leases)
	for name, addrs := range s.names {
		for a, l := range addrs {
			out = append(out, aged{pair{name, a}, *l})
		}
	}
	slices.SortFunc(out, func(x, y aged) int {
		if c := x.seen.Compare(y.seen); c != 0 {
			return c
		}
		if x.name != y.name {
			if x.name < y.name {
				return -1
			}
			return 1
		}
		return x.addr.Compare(y.addr)
	})
	return out
}

// learned is the state as the kernel is to have it, sorted by address.
func (s *state) learned() []netpol.Learned {
	if len(s.addrs) == 0 {
		return nil
	}
	out := make([]netpol.Learned, 0, len(s.addrs))
	for _, a := range slices.SortedFunc(maps.Keys(s.addrs), netip.Addr.Compare) {
		// Nothing got into the state that does not merge.
		if steps, err := s.merged(a, nil, nil); err == nil && len(steps) > 0 {
			out = append(out, netpol.Learned{Addr: a, Steps: steps})
		}
	}
	return out
}

// records is the state as the journal has it, oldest leases first.
func (s *state) records() []record {
	var out []record
	for _, e := range s.byAge() {
		if n := len(out); n > 0 && out[n-1].Name == e.name && out[n-1].Seen == e.seen.UnixMilli() {
			out[n-1].Addrs = append(out[n-1].Addrs, e.addr)
			out[n-1].Expires = append(out[n-1].Expires, e.expires.UnixMilli())
			continue
		}
		out = append(out, record{Name: e.name, Seen: e.seen.UnixMilli(), Addrs: []netip.Addr{e.addr}, Expires: []int64{e.expires.UnixMilli()}})
	}
	return out
}

// nextExpiry is when the first lease ends; zero if there is none.
func (s *state) nextExpiry() time.Time {
	var first time.Time
	for _, addrs := range s.names {
		for _, l := range addrs {
			if first.IsZero() || l.expires.Before(first) {
				first = l.expires
			}
		}
	}
	return first
}
