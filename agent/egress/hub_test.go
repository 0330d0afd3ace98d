// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/netpol"
)

var (
	api  = netip.MustParseAddr("203.0.113.10")
	evil = netip.MustParseAddr("198.51.100.7")
	at   = time.Date(2026, 11, 2, 10, 0, 0, 0, time.UTC)
)

func always(string) bool { return true }

// sent is an event of an allow rule at a second, with the totals of its counter.
func sent(second int, to netip.Addr, packets, bytes uint64) FlowEvent {
	return FlowEvent{ID: "a", Time: at.Add(time.Duration(second) * time.Second), Tenant: "acme", Rule: "api", Reason: "allow",
		Proto: netpol.TCP, Peer: to, PeerPort: 443, Bytes: 60, TotalPackets: packets, TotalBytes: bytes}
}

type sums struct {
	Peer           string
	Packets, Bytes uint64
}

func shown(entries []Entry) (out []sums) {
	for _, e := range entries {
		if e.Flow != nil {
			out = append(out, sums{e.Flow.Peer.String(), e.Flow.Packets, e.Flow.Bytes})
		}
	}
	return out
}

// Every packet that a counter saw is in the sum of exactly one entry.
func TestSuppressedPacketsAreCounted(t *testing.T) {
	h := New(Config{Live: always})
	for _, e := range []FlowEvent{
		sent(0, api, 1, 60),
		sent(0, api, 2, 120),  // the same flow in the same second: no entry of its own
		sent(0, evil, 3, 180), // another destination in the same second is worth one
		sent(1, api, 13, 1_180),
		sent(2, api, 18, 1_480),
		sent(3, api, 2, 120), // the counter began anew
		sent(4, api, 2, 120), // nothing more: cannot be, and is not negative
		sent(5, api, 4_002, 9_000_120),
	} {
		h.Flow(e)
	}
	want := []sums{
		{api.String(), 1, 60}, {evil.String(), 2, 120}, {api.String(), 10, 1_000}, {api.String(), 5, 300},
		{api.String(), 2, 120}, {api.String(), 0, 0}, {api.String(), 4_000, 9e6},
	}
	if diff := cmp.Diff(want, shown(h.Recent("a", Filter{}, 0))); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
}

// What a rule lets pass and what it denies have entries of their own in the
// same second, and share a counter. What a limit drops of it does not: that
// counts for the limit's reason, together with what it drops of other rules.
func TestCountersOfARule(t *testing.T) {
	h := New(Config{Live: always})
	drop := func(second int, rule, reason string, packets, bytes uint64) FlowEvent {
		e := sent(second, api, packets, bytes)
		e.Rule, e.Reason = rule, reason
		return e
	}
	for _, e := range []FlowEvent{
		sent(0, api, 10, 1_000),
		drop(0, "api", "rule_deny", 14, 1_400),
		drop(0, "api", "rate", 3, 300),
		sent(1, api, 15, 1_500),
		drop(1, "other", "rate", 5, 500),
		drop(2, "api", "rate", 6, 600),
		drop(2, "api", "budget", 1, 100),
		sent(2, api, 16, 1_600),
	} {
		h.Flow(e)
	}
	var want []sums
	for _, n := range []uint64{10, 4, 3, 1, 2, 1, 1, 1} {
		want = append(want, sums{api.String(), n, 100 * n})
	}
	if diff := cmp.Diff(want, shown(h.Recent("a", Filter{}, 0))); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
}

// Counters are told apart by sandbox and rule, and without a rule by reason and
// direction.
func TestCountersHaveTheirOwnTotals(t *testing.T) {
	h := New(Config{Live: always})
	base := sent(0, api, 5, 300)
	for _, change := range []func(*FlowEvent){
		func(*FlowEvent) {},
		func(e *FlowEvent) { e.Rule = "other" },
		func(e *FlowEvent) { e.Tenant = "acme/vision" },
		func(e *FlowEvent) { e.Reason, e.Rule, e.Tenant = "no_rule", "", "" },
		func(e *FlowEvent) { e.Reason, e.Rule, e.Tenant = "metadata", "", "" },
		func(e *FlowEvent) { e.Reason, e.Rule, e.Tenant, e.Inbound = "no_rule", "", "", true },
		func(e *FlowEvent) { e.ID = "b" },
	} {
		e := base
		change(&e)
		h.Flow(e)
	}
	got := append(h.Recent("a", Filter{}, 0), h.Recent("b", Filter{}, 0)...)
	if len(got) != 7 {
		t.Fatalf("%d entries, want 7", len(got))
	}
	for _, e := range got {
		if e.Flow.Packets != 5 {
			t.Errorf("%+v counts %d packets, want 5", e.Flow.FlowEvent, e.Flow.Packets)
		}
	}
}

// A sandbox with more kinds than are remembered loses sums, not the bound.
func TestTalliesAreBounded(t *testing.T) {
	h := New(Config{Live: always})
	for i := range maxKinds + 10 {
		e := sent(i, api, 1_000, 60_000)
		e.Rule = fmt.Sprint("r", i)
		h.Flow(e)
	}
	h.mu.Lock()
	kinds, counters := len(h.logs["a"].kinds), len(h.logs["a"].counters)
	h.mu.Unlock()
	if kinds > maxKinds || counters > maxKinds {
		t.Errorf("%d tallies and %d counters kept, at most %d", kinds, counters, maxKinds)
	}
	last := h.Recent("a", Filter{}, 1)[0].Flow
	if last.Packets != 1 || last.Bytes != 60 {
		t.Errorf("a counter of unknown past counts %d packets, %d bytes; want this one alone", last.Packets, last.Bytes)
	}
}

func TestFilter(t *testing.T) {
	h := New(Config{Live: always})
	denied, audited := sent(1, evil, 1, 60), sent(2, evil, 1, 60)
	denied.Reason, denied.Rule = "no_rule", ""
	audited.Audit = "no_rule"
	h.Flow(sent(0, api, 1, 60))
	h.Flow(denied)
	h.Flow(audited)
	h.DNS(DNSEvent{ID: "a", Time: at, Name: "api.example.com", Outcome: "answered"})
	h.DNS(DNSEvent{ID: "a", Time: at, Name: "evil.example.net", Outcome: "refused", Denied: true})
	h.DNS(DNSEvent{ID: "a", Time: at, Name: "new.example.net", Outcome: "answered", Audit: true})
	for _, test := range []struct {
		filter Filter
		tail   int
		want   []string
	}{
		{Filter{}, 0, []string{Allow, Deny, Audit, Allow, Deny, Audit}},
		{Filter{}, 2, []string{Deny, Audit}},
		{Filter{}, 99, []string{Allow, Deny, Audit, Allow, Deny, Audit}},
		{Filter{}, -1, nil},
		{Filter{Denied: true}, 0, []string{Deny, Deny}},
		{Filter{Audit: true}, 0, []string{Audit, Audit}},
		{Filter{Audit: true}, 1, []string{Audit}},
		{Filter{Denied: true, Audit: true}, 0, []string{Deny, Audit, Deny, Audit}},
	} {
		var got []string
		for _, e := range h.Recent("a", test.filter, test.tail) {
			got = append(got, e.Verdict())
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%+v, last %d (-want +got):\n%s", test.filter, test.tail, diff)
		}
	}
	if h.Recent("nobody", Filter{}, 0) != nil {
		t.Error("a sandbox without events has entries")
	}
}

func TestLogsAreBounded(t *testing.T) {
	h := New(Config{Live: always, PerSandbox: 10, Total: 24})
	fill := func(id string) {
		for i := range 30 {
			e := sent(i, api, uint64(i+1), 60)
			e.ID = id
			h.Flow(e)
		}
	}
	total := func() (n int) {
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, l := range h.logs {
			n += len(l.entries)
		}
		return n
	}
	for i, want := range []int{10, 20, 24, 24} {
		fill(fmt.Sprint("box", i))
		if got := total(); got != want {
			t.Errorf("%d sandboxes keep %d entries, want %d", i+1, got, want)
		}
	}
	if got := h.Recent("box3", Filter{}, 0); len(got) != 6 || !got[5].Flow.Time.Equal(at.Add(29*time.Second)) {
		t.Errorf("the newest entries are not the ones that are kept: %d", len(got))
	}
}

func TestNames(t *testing.T) {
	h := New(Config{Live: always, Names: func(id string, a netip.Addr) []string {
		if id == "a" && a == api {
			return []string{"cdn.example.com"}
		}
		return nil
	}})
	h.DNS(DNSEvent{ID: "a", Time: at, Name: "api.example.com", Addrs: []netip.Addr{api, evil}})
	h.DNS(DNSEvent{ID: "a", Time: at, Name: "cdn.example.com", Addrs: []netip.Addr{api}})
	h.Flow(sent(0, api, 1, 60))
	h.Flow(sent(0, evil, 2, 120))
	got := h.Recent("a", Filter{}, 2)
	if diff := cmp.Diff([]string{"cdn.example.com", "api.example.com"}, got[0].Flow.Names); diff != "" {
		t.Errorf("names of %s (-want +got):\n%s", api, diff)
	}
	if diff := cmp.Diff([]string{"api.example.com"}, got[1].Flow.Names); diff != "" {
		t.Errorf("names of %s (-want +got):\n%s", evil, diff)
	}
	if got := h.NamesOf("b", api); got != nil {
		t.Errorf("another sandbox knows %v", got)
	}
	for i := range namesPerAddr + 2 { // the oldest go, and entries keep theirs
		h.DNS(DNSEvent{ID: "a", Time: at, Name: fmt.Sprintf("n%d.example.com", i), Addrs: []netip.Addr{evil}})
	}
	if diff := cmp.Diff([]string{"n2.example.com", "n3.example.com", "n4.example.com", "n5.example.com"}, h.NamesOf("a", evil)); diff != "" {
		t.Errorf("names of %s (-want +got):\n%s", evil, diff)
	}
	if got[1].Flow.Names[0] != "api.example.com" {
		t.Errorf("an entry changed its names to %v", got[1].Flow.Names)
	}
	next := netip.MustParseAddr("10.0.0.0")
	for range maxAddrs + 5 {
		next = next.Next()
		h.DNS(DNSEvent{ID: "a", Time: at, Name: "wide.example.com", Addrs: []netip.Addr{next}})
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if l := h.logs["a"]; len(l.names) != maxAddrs || len(l.order) != maxAddrs || l.names[evil] != nil {
		t.Errorf("%d addresses (%d in order) are kept, want %d without the oldest", len(l.names), len(l.order), maxAddrs)
	}
}

func TestLast(t *testing.T) {
	h := New(Config{Live: always})
	if got := h.Last("a"); len(got) != 0 {
		t.Errorf("before anything: %v", got)
	}
	h.Flow(sent(3, api, 1, 60))
	h.Flow(sent(3, api, 1, 60)) // no entry of its own, and yet seen
	h.Flow(sent(2, api, 1, 60)) // late
	noRule := sent(9, evil, 1, 60)
	noRule.Rule, noRule.Tenant, noRule.Reason = "", "", "no_rule"
	h.Flow(noRule)
	want := map[RuleKey]time.Time{{"acme", "api"}: at.Add(3 * time.Second)}
	if diff := cmp.Diff(want, h.Last("a")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A reader that falls behind loses the oldest entries and learns how many; the
// writer never waits.
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New(Config{Live: always, PerSandbox: 4})
		h.Flow(sent(0, api, 1, 60))
		s := h.Subscribe("a", Filter{}, 0)
		defer s.Close()
		for i := 1; i <= 20; i++ {
			h.Flow(sent(i, api, uint64(i+1), 60))
		}
		var missed uint64
		var seen []int
		for len(seen) < 8 { // twice what the log keeps
			e, n, err := s.Next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			missed += n
			seen = append(seen, int(e.Flow.Time.Sub(at).Seconds()))
		}
		if diff := cmp.Diff([]int{13, 14, 15, 16, 17, 18, 19, 20}, seen); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if missed != 13 {
			t.Errorf("%d missed, want 13", missed)
		}
		next := make(chan int, 1)
		go func() {
			e, n, err := s.Next(t.Context())
			if err != nil || n != 0 {
				t.Errorf("the next entry: %d missed, %v", n, err)
			}
			next <- int(e.Flow.Time.Sub(at).Seconds())
		}()
		synctest.Wait() // it waits for one
		h.Flow(sent(30, api, 100, 600))
		if got := <-next; got != 30 {
			t.Errorf("read entry %d, want 30", got)
		}
	})
}

func TestSubscription(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New(Config{Live: always})
		s := h.Subscribe("a", Filter{Denied: true}, -1)
		h.Flow(sent(0, api, 1, 60)) // the filter leaves it out
		denied := sent(1, evil, 1, 60)
		denied.Reason, denied.Rule = "no_rule", ""
		h.Flow(denied)
		other := denied
		other.ID = "b"
		h.Flow(other)
		s.Close() // what has come stays readable
		if e, _, err := s.Next(t.Context()); err != nil || e.Flow.ID != "a" || e.Verdict() != Deny {
			t.Errorf("read %+v, %v", e.Flow, err)
		}
		if _, _, err := s.Next(t.Context()); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v, want io.EOF", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		open := h.Subscribe("a", Filter{}, -1)
		defer open.Close()
		cancel()
		if _, _, err := open.Next(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("with a reader that left: %v", err)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if n := len(h.logs["a"].subs); n != 1 {
			t.Errorf("%d readers are left, want 1", n)
		}
	})
}

// A log outlives its sandbox for a while, then it goes and its readers end.
func TestForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var gone atomic.Bool
		h := New(Config{Keep: 10 * time.Minute, Live: func(id string) bool { return id != "a" || !gone.Load() }})
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error, 1)
		go func() { ran <- h.Run(ctx) }()
		h.Flow(sent(0, api, 1, 60))
		h.DNS(DNSEvent{ID: "b", Time: at, Name: "api.example.com"})
		s := h.Subscribe("a", Filter{}, -1)
		kept := func() bool { return len(h.Recent("a", Filter{}, 0)) == 1 }
		time.Sleep(time.Hour)
		if !kept() {
			t.Error("forgotten while it lives")
		}
		gone.Store(true)
		time.Sleep(9 * time.Minute)
		if !kept() {
			t.Error("forgotten too early")
		}
		time.Sleep(3 * time.Minute)
		if kept() {
			t.Error("never forgotten")
		}
		if _, _, err := s.Next(ctx); !errors.Is(err, io.EOF) {
			t.Errorf("a reader of it: %v, want io.EOF", err)
		}
		s.Close()
		if len(h.Recent("b", Filter{}, 0)) != 1 {
			t.Error("a sandbox that lives was forgotten")
		}
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
}

func BenchmarkFlow(b *testing.B) {
	h := New(Config{Live: always})
	e := sent(0, api, 0, 0)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		e.Time = e.Time.Add(time.Second)
		e.TotalPackets, e.TotalBytes = uint64(i), uint64(60*i)
		h.Flow(e)
	}
}
