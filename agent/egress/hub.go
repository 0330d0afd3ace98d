// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"context"
	"io"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// Config of a Hub.
type Config struct {
	PerSandbox int                                    // entries kept of one sandbox; 0: 1024
	Total      int                                    // entries kept of all; 0: 65536
	Keep       time.Duration                          // how long a log outlives its sandbox; 0: 1 h
	Live       func(id string) bool                   // required; called without locks of the hub
	Names      func(id string, a netip.Addr) []string // behind an address; nil: only what events told; called without locks of the hub
}

const (
	sweepEvery   = time.Minute
	maxKinds     = 4096 // tallies of one sandbox
	maxAddrs     = 1024 // with names, of one sandbox
	namesPerAddr = 4
)

// Hub holds the logs of all sandboxes.
type Hub struct {
	cfg Config

	mu   sync.Mutex
	logs map[string]*log // +checklocks:mu
}

// kind is what the kernel logs once a second.
type kind struct {
	tenant, rule, reason, audit string
	inbound                     bool
}

// counter names one of the kernel's: of a rule, or of a reason.
type counter struct {
	tenant, rule, reason string
	inbound              bool
}

// counted is where a kernel counter stood.
type counted struct{ packets, bytes uint64 }

// peer is the other end of a flow.
type peer struct {
	addr  netip.Addr
	port  uint16
	proto netpol.Proto
}

// tally is what has been counted of one kind.
type tally struct {
	untold counted // since the last entry
	second int64   // of the last entry, and whom it was about
	peer   peer
	last   time.Time
}

// log of one sandbox. All of it is guarded by Hub.mu.
type log struct {
	entries  []Entry // oldest first
	kinds    map[kind]*tally
	counters map[counter]counted
	forgot   bool // counters were dropped: one that is new here may not be new
	names    map[netip.Addr][]string
	order    []netip.Addr // of names, oldest first
	subs     map[*Subscription]bool
	gone     time.Time // when it was first found not to live; zero: it lives
}

// New makes an empty Hub.
func New(cfg Config) *Hub {
	if cfg.PerSandbox == 0 {
		cfg.PerSandbox = 1024
	}
	if cfg.Total == 0 {
		cfg.Total = 65536
	}
	if cfg.Keep == 0 {
		cfg.Keep = time.Hour
	}
	return &Hub{cfg: cfg, logs: map[string]*log{}}
}

// Run forgets the logs of sandboxes that are gone, until ctx ends.
func (h *Hub) Run(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			h.sweep()
		case <-ctx.Done():
			return nil
		}
	}
}

func (h *Hub) sweep() {
	h.mu.Lock()
	live := make(map[string]bool, len(h.logs))
	for id := range h.logs {
		live[id] = false
	}
	h.mu.Unlock()
	for id := range live {
		live[id] = h.cfg.Live(id)
	}
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, lives := range live {
		l := h.logs[id]
		switch {
		case lives:
			l.gone = time.Time{}
		case l.gone.IsZero():
			l.gone = now
		case now.Sub(l.gone) >= h.cfg.Keep:
			delete(h.logs, id)
			for s := range l.subs {
				s.end()
			}
		}
	}
}

// of answers the log of a sandbox; it is called with mu held.
func (h *Hub) of(id string) *log {
	l := h.logs[id]
	if l == nil {
		l = &log{
			kinds: map[kind]*tally{}, counters: map[counter]counted{},
			names: map[netip.Addr][]string{}, subs: map[*Subscription]bool{},
		}
		h.logs[id] = l
		most := h.most()
		for _, other := range h.logs { // each gives up what the newcomer may have
			if n := len(other.entries) - most; n > 0 {
				other.entries = slices.Clone(other.entries[n:])
			}
		}
	}
	return l
}

// most is how many entries a log may have now; it is called with mu held.
func (h *Hub) most() int {
	return max(1, min(h.cfg.PerSandbox, h.cfg.Total/max(1, len(h.logs))))
}

// Flow takes an event of the kernel. It never blocks.
func (h *Hub) Flow(e FlowEvent) {
	var names []string
	if h.cfg.Names != nil && e.Peer.IsValid() {
		names = h.cfg.Names(e.ID, e.Peer)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.of(e.ID)
	sum, tell := l.count(e)
	if tell {
		h.add(l, Entry{Flow: &Flow{FlowEvent: e, Names: union(names, l.names[e.Peer]), Packets: sum.packets, Bytes: sum.bytes}})
	}
}

// DNS takes an event of the resolver. It never blocks.
func (h *Hub) DNS(e DNSEvent) {
	e.Addrs = slices.Clone(e.Addrs)
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.of(e.ID)
	for _, a := range e.Addrs {
		l.named(a, e.Name)
	}
	h.add(l, Entry{Lookup: &e})
}

// counterOf answers whose totals an event carries. What a limit drops counts
// for the limit's reason alone, though the event names the rule.
func counterOf(e FlowEvent) counter {
	if e.Rule != "" && (e.Reason == netpol.ReasonAllowed || e.Reason == netpol.ReasonDenied) {
		return counter{tenant: e.Tenant, rule: e.Rule}
	}
	return counter{reason: e.Reason, inbound: e.Inbound}
}

// moved answers by how much the counter of an event has moved since it was last
// heard of.
func (l *log) moved(e FlowEvent) counted {
	c := counterOf(e)
	before, known := l.counters[c]
	if !known && len(l.counters) >= maxKinds {
		clear(l.counters)
		l.forgot = true
	}
	l.counters[c] = counted{e.TotalPackets, e.TotalBytes}
	switch {
	case known && e.TotalPackets >= before.packets && e.TotalBytes >= before.bytes:
		return counted{e.TotalPackets - before.packets, e.TotalBytes - before.bytes}
	case known || !l.forgot: // it began anew, or is new
		return counted{e.TotalPackets, e.TotalBytes}
	}
	return counted{1, e.Bytes}
}

// count adds what its counter has moved by, and answers whether the event makes
// an entry: the same flow in the same second does not.
func (l *log) count(e FlowEvent) (sum counted, tell bool) {
	k := kind{e.Tenant, e.Rule, e.Reason, e.Audit, e.Inbound}
	t := l.kinds[k]
	if t == nil {
		if len(l.kinds) >= maxKinds {
			clear(l.kinds)
		}
		t = &tally{}
		l.kinds[k] = t
	}
	more := l.moved(e)
	t.untold.packets += more.packets
	t.untold.bytes += more.bytes
	to, second := peer{e.Peer, e.PeerPort, e.Proto}, e.Time.Unix()
	again := !t.last.IsZero() && t.second == second && t.peer == to
	if e.Time.After(t.last) {
		t.last = e.Time
	}
	if again {
		return counted{}, false
	}
	t.second, t.peer = second, to
	sum, t.untold = t.untold, counted{}
	return sum, true
}

// named notes that name led to a.
func (l *log) named(a netip.Addr, name string) {
	old, there := l.names[a]
	if !there {
		if len(l.order) >= maxAddrs {
			delete(l.names, l.order[0])
			l.order = l.order[1:]
		}
		l.order = append(l.order, a)
	}
	if slices.Contains(old, name) {
		return
	}
	if len(old) >= namesPerAddr {
		old = old[1:]
	}
	l.names[a] = append(slices.Clone(old), name) // entries may hold the old one
}

// add appends to the log and to what its readers have still to read; it is
// called with mu held.
func (h *Hub) add(l *log, e Entry) {
	if n := len(l.entries) + 1 - h.most(); n > 0 {
		clear(l.entries[:n])
		l.entries = l.entries[n:]
	}
	l.entries = append(l.entries, e)
	for s := range l.subs {
		if s.filter.takes(e) {
			s.push(e)
		}
	}
}

// Recent answers the last entries that filter takes, oldest first: tail of
// them, all that are kept if tail is 0, none if it is negative.
func (h *Hub) Recent(id string, filter Filter, tail int) []Entry {
	h.mu.Lock()
	defer h.mu.Unlock()
	if l := h.logs[id]; l != nil {
		return l.recent(filter, tail)
	}
	return nil
}

func (l *log) recent(filter Filter, tail int) []Entry {
	var out []Entry
	for i := len(l.entries) - 1; i >= 0 && tail >= 0 && (tail == 0 || len(out) < tail); i-- {
		if e := l.entries[i]; filter.takes(e) {
			out = append(out, e)
		}
	}
	slices.Reverse(out)
	return out
}

// Subscribe begins with what Recent answers and goes on with what comes. The
// caller closes it.
func (h *Hub) Subscribe(id string, filter Filter, tail int) *Subscription {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.of(id)
	s := &Subscription{h: h, l: l, filter: filter, most: 2 * h.cfg.PerSandbox, ready: make(chan struct{}, 1), rest: l.recent(filter, tail)}
	l.subs[s] = true
	s.wake()
	return s
}

// RuleKey names a rule.
type RuleKey struct{ Tenant, Rule string }

// Last answers when each rule was last seen in the log.
func (h *Hub) Last(id string) map[RuleKey]time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := map[RuleKey]time.Time{}
	l := h.logs[id]
	if l == nil {
		return out
	}
	for k, t := range l.kinds {
		if key := (RuleKey{k.tenant, k.rule}); k.rule != "" && t.last.After(out[key]) {
			out[key] = t.last
		}
	}
	return out
}

// NamesOf answers which names the sandbox has resolved to an address.
func (h *Hub) NamesOf(id string, a netip.Addr) []string {
	var names []string
	if h.cfg.Names != nil {
		names = h.cfg.Names(id, a)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if l := h.logs[id]; l != nil {
		names = union(names, l.names[a])
	}
	return names
}

// union is a and what only b has.
func union(a, b []string) []string {
	out := slices.Clone(a)
	for _, s := range b {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// Subscription is one reader of a log. All of it is guarded by Hub.mu, but for
// ready.
type Subscription struct {
	h      *Hub
	l      *log
	filter Filter
	most   int
	rest   []Entry // still to be read
	missed uint64
	ended  bool
	ready  chan struct{} // holds a token while there may be something to read; never closed
}

// push is called with Hub.mu held.
func (s *Subscription) push(e Entry) {
	if len(s.rest) >= s.most {
		s.rest = s.rest[1:]
		s.missed++
	}
	s.rest = append(s.rest, e)
	s.wake()
}

// end is called with Hub.mu held.
func (s *Subscription) end() {
	s.ended = true
	s.wake()
}

func (s *Subscription) wake() {
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

// Next waits for an entry. missed is how many were lost before it. The error is
// io.EOF when the log has been forgotten, else that of ctx.
func (s *Subscription) Next(ctx context.Context) (e Entry, missed uint64, err error) {
	for {
		s.h.mu.Lock()
		if len(s.rest) > 0 {
			e, missed = s.rest[0], s.missed
			s.rest, s.missed = s.rest[1:], 0
			s.h.mu.Unlock()
			return e, missed, nil
		}
		ended := s.ended
		s.h.mu.Unlock()
		if ended {
			return Entry{}, 0, io.EOF
		}
		select {
		case <-s.ready:
		case <-ctx.Done():
			return Entry{}, 0, ctx.Err()
		}
	}
}

// Close ends the subscription; what is still to be read stays readable.
func (s *Subscription) Close() {
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	delete(s.l.subs, s)
	s.end()
}
