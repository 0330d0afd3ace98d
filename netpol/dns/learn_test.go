// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/bulkheadhq/bulkhead/netpol"
)

func (r *rig) journalText() string {
	r.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.dir, testID))
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

// The journal knows an address before the kernel, the kernel before the client.
func TestOrder(t *testing.T) {
	r := newRig(t, compile(t, webRules), newZone("www.example.com. 60 A 93.184.216.34"), nil)
	journalled := false
	r.tb.set(func() {
		r.tb.fail = func(op string, _ int) error {
			if op == "learn" {
				journalled = strings.Contains(r.journalText(), "93.184.216.34")
			}
			return nil
		}
	})
	if m := r.ask("www.example.com", mdns.TypeA); len(m.Answer) != 1 {
		t.Fatal(told(m))
	}
	if !journalled {
		t.Error("the kernel learned an address that the journal did not know")
	}
}

// When the kernel or the journal does not take an address the client gets
// none of the answer, and what was there before is there again.
func TestNothingHalfLearned(t *testing.T) {
	z := newZone("www.example.com. 60 A 93.184.216.34", "a.cdn.example.com. 60 A 93.184.216.34",
		"a.cdn.example.com. 60 A 93.184.216.35", "a.cdn.example.com. 60 A 93.184.216.36")
	for at := 1; at <= 3; at++ {
		for _, broken := range []error{errNoMemory, errTableFull} {
			r := newRig(t, compile(t, webRules), z, nil)
			r.ask("www.example.com", mdns.TypeA)
			ports := r.tb.ports("93.184.216.34")
			n := 0
			r.tb.set(func() {
				r.tb.fail = func(op string, _ int) error {
					if op == "learn" {
						if n++; n == at {
							return broken
						}
					}
					return nil
				}
			})
			m := r.ask("a.cdn.example.com", mdns.TypeA)
			if m.Rcode != mdns.RcodeServerFailure || len(m.Answer) != 0 || !strings.Contains(told(m), broken.Error()) {
				t.Errorf("learn %d failed: got %s", at, told(m))
			}
			if got := r.outcomes(); got[len(got)-1] != OutcomeLearn {
				t.Errorf("learn %d failed: events %v", at, got)
			}
			if got := r.tb.has(); !slices.Equal(got, []string{"93.184.216.34"}) || r.tb.ports("93.184.216.34") != ports {
				t.Errorf("learn %d failed: the kernel has %v", at, got)
			}
			r.consistent()
			r.tb.set(func() { r.tb.fail = nil })
			if m := r.ask("a.cdn.example.com", mdns.TypeA); len(m.Answer) != 3 {
				t.Errorf("after the failure: %s", told(m))
			}
			r.consistent()
		}
	}
}

// A kernel that cannot even be put back is put right as soon as it can be.
func TestUndoFails(t *testing.T) {
	z := newZone("a.cdn.example.com. 60 A 93.184.216.35", "a.cdn.example.com. 60 A 93.184.216.36")
	r := newRig(t, compile(t, webRules), z, nil)
	n := 0
	r.tb.set(func() {
		r.tb.fail = func(string, int) error {
			if n++; n > 1 {
				return errNoMemory
			}
			return nil
		}
	})
	if m := r.ask("a.cdn.example.com", mdns.TypeA); m.Rcode != mdns.RcodeServerFailure {
		t.Fatal(told(m))
	}
	if got := r.tb.has(); !slices.Equal(got, []string{"93.184.216.35"}) {
		t.Fatalf("the test must leave an address behind, not %v", got)
	}
	r.sb.expire(time.Now().Add(2 * retryAfter)) // still broken
	r.tb.set(func() { r.tb.fail = nil })
	r.sb.expire(time.Now().Add(4 * retryAfter))
	if got := r.tb.has(); len(got) != 0 {
		t.Errorf("the kernel has %v, want nothing", got)
	}
	r.consistent()
}

func TestJournalFails(t *testing.T) {
	r := newRig(t, compile(t, webRules), newZone("www.example.com. 60 A 93.184.216.34"), nil)
	if err := os.Rename(r.dir, r.dir+".gone"); err != nil {
		t.Fatal(err)
	}
	if m := r.ask("www.example.com", mdns.TypeA); m.Rcode != mdns.RcodeServerFailure || len(r.tb.has()) != 0 {
		t.Errorf("without a journal: %s, learned %v", told(m), r.tb.has())
	}
	if err := os.Rename(r.dir+".gone", r.dir); err != nil {
		t.Fatal(err)
	}
	if m := r.ask("www.example.com", mdns.TypeA); len(m.Answer) != 1 {
		t.Error(told(m))
	}
	r.consistent()
}

// 5,000 addresses of one name, each seen once: never more than the cap, and
// none that a flow uses goes.
func TestRotatingName(t *testing.T) {
	r := newRig(t, compile(t, webRules), nil, func(c *Config) { c.AddrsPerName = 50; c.AddrsPerSandbox = 80 })
	next := 0
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{93, 184, byte(i >> 8), byte(i)}) }
	r.srv.up = replier(func(name string, qtype uint16) *mdns.Msg {
		m := new(mdns.Msg)
		m.SetQuestion(mdns.Fqdn(name), qtype)
		m.Answer = append(m.Answer, &mdns.A{Hdr: mdns.RR_Header{Name: mdns.Fqdn(name), Rrtype: mdns.TypeA, Class: 1}, A: addr(next).AsSlice()})
		next++
		return m
	})
	live := addr(3)
	for i := range 5000 {
		if i == 10 {
			r.tb.set(func() { r.tb.used[live] = time.Second })
		}
		m := r.ask("www.example.com", mdns.TypeA)
		if len(m.Answer) != 1 || m.Answer[0].Header().Ttl != 1 {
			t.Fatalf("query %d: %s", i, told(m))
		}
		if n := len(r.tb.has()); n > 50 {
			t.Fatalf("query %d: %d addresses", i, n)
		}
	}
	if got := r.tb.has(); !slices.Contains(got, live.String()) || !slices.Contains(got, addr(4999).String()) || len(got) != 50 {
		t.Errorf("%d addresses, among them the live one %v and the last one %v", len(got), slices.Contains(got, live.String()), slices.Contains(got, addr(4999).String()))
	}
	if s := r.srv.Stats(testID); s.Evicted != 4950 {
		t.Errorf("evicted %d, want 4950", s.Evicted)
	}
	if !slices.Contains(r.outcomes(), OutcomeEvicted) {
		t.Error("no event of an eviction")
	}
	r.consistent()

	// All in use: the answer is not released.
	r.tb.set(func() {
		for a := range r.tb.addrs {
			r.tb.used[a] = 0
		}
	})
	if m := r.ask("www.example.com", mdns.TypeA); m.Rcode != mdns.RcodeServerFailure || !strings.Contains(told(m), "too many addresses are in use") {
		t.Errorf("all in use: %s", told(m))
	}
	// Under another name there is room until the sandbox's own cap.
	for range 30 {
		if m := r.ask("a.cdn.example.com", mdns.TypeA); len(m.Answer) != 1 {
			t.Fatal(told(m))
		}
	}
	r.tb.set(func() {
		for a := range r.tb.addrs {
			r.tb.used[a] = 0
		}
	})
	if m := r.ask("b.cdn.example.com", mdns.TypeA); m.Rcode != mdns.RcodeServerFailure {
		t.Errorf("sandbox full: %s", told(m))
	}
	r.tb.set(func() { r.tb.used[live] = time.Hour })
	if m := r.ask("b.cdn.example.com", mdns.TypeA); len(m.Answer) != 1 || slices.Contains(r.tb.has(), live.String()) {
		t.Errorf("one is idle again: %s", told(m))
	}
	r.consistent()
}

// Any number of names of one address must not fill the memory, nor end what
// the address gives.
func TestNamesOfOneAddress(t *testing.T) {
	r := newRig(t, compile(t, webRules), nil, func(c *Config) { c.AddrsPerSandbox = 10; c.NamesPerMinute = 1 << 20 })
	r.srv.up = replier(func(name string, qtype uint16) *mdns.Msg {
		m := new(mdns.Msg)
		m.SetQuestion(mdns.Fqdn(name), qtype)
		rr, _ := mdns.NewRR(name + ". 3600 A 93.184.216.34")
		m.Answer = append(m.Answer, rr)
		return m
	})
	r.tb.set(func() { r.tb.used[netip.MustParseAddr("93.184.216.34")] = 0 })
	r.ask("www.example.com", mdns.TypeA)
	for i := range 500 {
		if m := r.ask(fmt.Sprintf("n%d.cdn.example.com", i), mdns.TypeA); len(m.Answer) != 1 {
			t.Fatal(told(m))
		}
		if n := r.sb.st.leases; n > 40 {
			t.Fatalf("%d leases", n)
		}
	}
	if got := r.tb.ports("93.184.216.34"); got != "443/tcp 80/tcp" {
		t.Errorf("the address in use gives %q", got)
	}
	r.consistent()
}

func TestExpiry(t *testing.T) {
	z := newZone("www.example.com. 10 A 93.184.216.34", "a.cdn.example.com. 600 A 93.184.216.34", "b.cdn.example.com. 10 A 93.184.216.35")
	r := newRig(t, compile(t, webRules), z, nil)
	start := time.Now()
	for _, name := range []string{"www.example.com", "a.cdn.example.com", "b.cdn.example.com"} {
		r.ask(name, mdns.TypeA)
	}
	shared, own := netip.MustParseAddr("93.184.216.34"), netip.MustParseAddr("93.184.216.35")
	r.tb.set(func() { r.tb.used[own] = 20 * time.Second })
	at := func(d time.Duration, wantShared, wantOwn string) {
		t.Helper()
		r.sb.expire(start.Add(d))
		if got := r.tb.ports(shared.String()); got != wantShared {
			t.Errorf("after %s the shared address gives %q, want %q", d, got, wantShared)
		}
		if got := r.tb.ports(own.String()); got != wantOwn {
			t.Errorf("after %s the other address gives %q, want %q", d, got, wantOwn)
		}
		r.consistent()
	}
	at(30*time.Second, "443/tcp 80/tcp", "443/tcp")
	// One of the two names of the shared address ends: its port goes.
	at(35*time.Second, "443/tcp", "443/tcp")
	// Nothing was sent for longer, but not for the idle time.
	r.tb.set(func() { r.tb.used[own] = 299 * time.Second })
	at(600*time.Second, "443/tcp", "443/tcp")
	r.tb.set(func() { r.tb.used[own] = 300 * time.Second })
	at(601*time.Second, "443/tcp", "")
	at(700*time.Second, "", "")
	if r.srv.Stats(testID).Expired != 3 || len(r.srv.Names(testID)) != 0 || r.sb.st.leases != 0 {
		t.Errorf("left: %+v, expired %d", r.srv.Names(testID), r.srv.Stats(testID).Expired)
	}
	// Nothing to do costs no look at the kernel.
	calls := r.tb.calls
	r.sb.expire(start.Add(time.Hour))
	if r.tb.calls != calls {
		t.Error("the kernel is read although nothing can end")
	}
}

func TestExpiryFails(t *testing.T) {
	r := newRig(t, compile(t, webRules), newZone("www.example.com. 10 A 93.184.216.34"), nil)
	r.ask("www.example.com", mdns.TypeA)
	now := time.Now().Add(time.Minute)
	for _, op := range []string{"learned", "forget"} {
		r.tb.set(func() {
			r.tb.fail = func(o string, _ int) error {
				if o == op {
					return errNoMemory
				}
				return nil
			}
		})
		r.sb.expire(now)
		if len(r.srv.Names(testID)) != 1 {
			t.Errorf("%s failed: the name is forgotten, the kernel has %v", op, r.tb.has())
		}
		now = now.Add(time.Minute)
	}
	r.tb.set(func() { r.tb.fail = nil })
	r.sb.expire(now)
	if len(r.srv.Names(testID)) != 0 || len(r.tb.has()) != 0 {
		t.Errorf("names %v, kernel %v", r.srv.Names(testID), r.tb.has())
	}
	r.consistent()
}

func TestSwap(t *testing.T) {
	z := newZone("www.example.com. 60 A 93.184.216.34", "a.cdn.example.com. 60 A 93.184.216.34",
		"b.cdn.example.com. 60 A 93.184.216.35", "inner.example.com. 60 A 10.0.0.2")
	r := newRig(t, compile(t, webRules), z, nil)
	for _, name := range []string{"www.example.com", "a.cdn.example.com", "b.cdn.example.com", "inner.example.com"} {
		if m := r.ask(name, mdns.TypeA); len(m.Answer) != 1 {
			t.Fatal(told(m))
		}
	}
	if got := r.srv.NamesOf(testID, netip.MustParseAddr("93.184.216.34")); !slices.Equal(got, []string{"a.cdn.example.com", "www.example.com"}) {
		t.Errorf("names of an address: %v", got)
	}
	// A policy that allows less of everything.
	p := compile(t, `
- {name: web, action: allow, to: [{fqdn: "a.cdn.example.com"}], ports: [443/tcp]}
- {name: inner, action: allow, to: [{fqdn: inner.example.com}], ports: [5432/tcp]}
`)
	refusal := errors.New("map full")
	if err := r.srv.Swap(testID, p, func([]netpol.Learned) error { return refusal }); !errors.Is(err, refusal) {
		t.Fatal(err)
	}
	if len(r.srv.Names(testID)) != 4 {
		t.Error("a change that failed ended names")
	}
	r.consistent()
	if m := r.ask("www.example.com", mdns.TypeA); len(m.Answer) != 1 {
		t.Errorf("after a change that failed: %s", told(m))
	}
	if err := r.srv.Swap(testID, p, func(l []netpol.Learned) error { return r.tb.swapped(p, l) }); err != nil {
		t.Fatal(err)
	}
	names := r.srv.Names(testID)
	if len(names) != 1 || names[0].Name != "a.cdn.example.com" || !slices.Equal(names[0].Rules, []int{0}) {
		t.Errorf("names %+v", names)
	}
	if got := r.tb.ports("93.184.216.34"); got != "443/tcp" {
		t.Errorf("the shared address gives %q", got)
	}
	r.consistent()
	if m := r.ask("www.example.com", mdns.TypeA); m.Rcode != mdns.RcodeRefused {
		t.Errorf("revoked: %s", told(m))
	}
	if m := r.ask("inner.example.com", mdns.TypeA); m.Rcode != mdns.RcodeRefused {
		t.Errorf("without allow_private: %s", told(m))
	}
	called := false
	if err := r.srv.Swap("unknown", p, func(l []netpol.Learned) error { called = l == nil; return nil }); err != nil || !called {
		t.Errorf("swap of an unknown sandbox: %v, applied without addresses: %v", err, called)
	}
}

// An answer that arrives when the rule is gone is not released, and one that
// meets a policy that moved is learned under the new one.
func TestSwapMeetsAnswer(t *testing.T) {
	other := compile(t, strings.ReplaceAll(webRules, "443/tcp", "8443/tcp"))
	none := compile(t, "- {name: x, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [1/tcp]}\n")
	z := newZone("www.example.com. 60 A 93.184.216.34")
	for _, c := range []struct {
		to   netpol.Program
		want string
	}{{other, "NOERROR 93.184.216.34"}, {none, "REFUSED (18 no rule allows the name)"}} {
		r := newRig(t, compile(t, webRules), nil, nil)
		r.srv.up = replier(func(name string, qtype uint16) *mdns.Msg {
			if err := r.srv.Swap(testID, c.to, func(l []netpol.Learned) error { return r.tb.swapped(c.to, l) }); err != nil {
				t.Error(err)
			}
			q := new(mdns.Msg)
			q.SetQuestion(mdns.Fqdn(name), qtype)
			return z.answer(q)
		})
		if got := told(r.ask("www.example.com", mdns.TypeA)); got != c.want {
			t.Errorf("got %s, want %s", got, c.want)
		}
		r.consistent()
	}
	// The kernel is ahead of us for a moment.
	r := newRig(t, compile(t, webRules), z, nil)
	n := 0
	r.tb.set(func() {
		r.tb.fail = func(op string, _ int) error {
			if op != "learn" {
				return nil
			}
			if n++; n == 1 {
				return fmt.Errorf("learn: %w", ErrMoved)
			}
			return nil
		}
	})
	if got := told(r.ask("www.example.com", mdns.TypeA)); got != "NOERROR 93.184.216.34" {
		t.Errorf("moved once: %s", got)
	}
	r.consistent()
	r.tb.set(func() {
		r.tb.fail = func(string, int) error { return ErrMoved }
	})
	if m := r.ask("www.example.com", mdns.TypeA); m.Rcode != mdns.RcodeServerFailure {
		t.Errorf("moved twice: %s", told(m))
	}
}

// More steps than the kernel takes: the first names stay, and a change of
// policy goes through.
func TestTooManySteps(t *testing.T) {
	var rules strings.Builder
	for i := range 20 {
		fmt.Fprintf(&rules, "- {name: r%d, action: allow, to: [{fqdn: n%d.example.com}], ports: [%d/tcp]}\n", i, i, 1000+2*i)
	}
	var records []string
	for i := range 20 {
		records = append(records, fmt.Sprintf("n%d.example.com. 60 A 93.184.216.34", i))
	}
	p := compile(t, rules.String())
	r := newRig(t, p, newZone(records...), nil)
	for i := range 20 {
		m := r.ask(fmt.Sprintf("n%d.example.com", i), mdns.TypeA)
		if want := i < netpol.MaxLearnedSteps; (len(m.Answer) == 1) != want {
			t.Errorf("name %d: %s", i, told(m))
		}
	}
	r.consistent()
	// Two rules for each name: half of the names fit.
	p2 := compile(t, rules.String()+strings.ReplaceAll(strings.ReplaceAll(rules.String(), "name: r", "name: s"), "[1", "[2"))
	if err := r.srv.Swap(testID, p2, func(l []netpol.Learned) error { return r.tb.swapped(p2, l) }); err != nil {
		t.Fatal(err)
	}
	if n := len(r.srv.Names(testID)); n != netpol.MaxLearnedSteps/2 {
		t.Errorf("%d names stayed, want %d", n, netpol.MaxLearnedSteps/2)
	}
	r.consistent()
}

// snapshot is the machine at the moment the agent is killed.
type snapshot struct {
	what     string
	journal  string
	kernel   map[netip.Addr][]netpol.PortRule
	released []string // addresses that a client knows
}

// The agent is killed between any two steps: after the restart the kernel and
// the journal agree, and every address that was released and has not ended is
// open.
func TestKilledAtEveryStep(t *testing.T) {
	p := compile(t, webRules)
	z := newZone("www.example.com. 60 A 93.184.216.34", "www.example.com. 60 A 93.184.216.35",
		"a.cdn.example.com. 600 A 93.184.216.34", "a.cdn.example.com. 600 A 93.184.216.36", "b.cdn.example.com. 60 A 93.184.216.37")
	r := newRig(t, p, z, func(c *Config) { c.AddrsPerName = 2 })
	var snaps []snapshot
	var released []string
	shot := func(what string) {
		snaps = append(snaps, snapshot{what, r.journalText(), maps.Clone(r.tb.addrs), slices.Clone(released)})
	}
	r.tb.fail = func(op string, n int) error { shot(fmt.Sprintf("before call %d, %s", n, op)); return nil }
	for _, name := range []string{"www.example.com", "a.cdn.example.com", "b.cdn.example.com", "www.example.com"} {
		m := r.ask(name, mdns.TypeA)
		r.tb.set(func() { shot("before the release of " + name) })
		for _, rr := range m.Answer {
			released = append(released, rr.(*mdns.A).A.String())
		}
	}
	z.mu.Lock()
	z.records["www.example.com A"] = []string{"www.example.com. 60 A 93.184.216.40"} // one must give way
	z.mu.Unlock()
	if m := r.ask("www.example.com", mdns.TypeA); len(m.Answer) != 1 {
		t.Fatal(told(m))
	}
	if len(snaps) < 12 {
		t.Fatalf("only %d steps", len(snaps))
	}
	for i, s := range snaps {
		// The last line may be torn where the journal was just written.
		cuts := []int{len(s.journal)}
		if i > 0 && strings.HasPrefix(s.journal, snaps[i-1].journal) {
			for cut := len(snaps[i-1].journal); cut < len(s.journal); cut++ {
				cuts = append(cuts, cut)
			}
		}
		for _, cut := range cuts {
			again := &rig{t: t, tb: newTable(p), zone: z, dir: t.TempDir()}
			if err := os.WriteFile(filepath.Join(again.dir, testID), []byte(s.journal[:cut]), 0o600); err != nil {
				t.Fatal(err)
			}
			again.tb.addrs = maps.Clone(s.kernel)
			again.open(p, nil)
			again.consistent()
			if cut < len(s.journal) {
				continue // then the kernel had not been asked, nor the client told
			}
			for _, a := range s.released {
				// 34 or 35 gives way to 40 at the end.
				if !slices.Contains(again.tb.has(), a) && !slices.Contains(snaps[len(snaps)-1].journalEnds(), a) {
					t.Errorf("killed %s: %s was released and is closed", s.what, a)
				}
			}
			again.srv.Close()
		}
	}
}

// journalEnds lists the addresses that a journal says have ended.
func (s snapshot) journalEnds() (out []string) {
	for line := range strings.Lines(s.journal) {
		if strings.Contains(line, `"a":`) && !strings.Contains(line, `"x":`) {
			_, list, _ := strings.Cut(line, `"a":["`)
			out = append(out, strings.Split(strings.SplitN(list, `"]`, 2)[0], `","`)...)
		}
	}
	return out
}

// A restart with a policy that allows less, a kernel that has what nobody
// knows, and one that has lost something.
func TestRestart(t *testing.T) {
	z := newZone("www.example.com. 60 A 93.184.216.34", "b.cdn.example.com. 60 A 93.184.216.35")
	p := compile(t, webRules)
	r := newRig(t, p, z, nil)
	r.ask("www.example.com", mdns.TypeA)
	r.ask("b.cdn.example.com", mdns.TypeA)
	expires := r.srv.Names(testID)[0].Expires
	if err := r.srv.Close(); err != nil {
		t.Fatal(err)
	}
	if got := r.tb.has(); len(got) != 2 {
		t.Fatalf("closing the server took addresses: %v", got)
	}
	narrow := compile(t, "- {name: web, action: allow, to: [{fqdn: b.cdn.example.com}], ports: [443/tcp]}\n")
	r.tb.digest = narrow.Digest
	r.tb.addrs = map[netip.Addr][]netpol.PortRule{netip.MustParseAddr("192.0.2.9"): {{Lo: 1, Hi: 2, Proto: netpol.TCP}}}
	cfg := r.sb.cfg
	srv, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if l := srv.Learned(testID, narrow); len(l) != 1 || l[0].Addr.String() != "93.184.216.35" {
		t.Errorf("before Start the journal gives %v", l)
	}
	srv.Close()
	r.open(narrow, nil)
	if got := r.tb.has(); !slices.Equal(got, []string{"93.184.216.35"}) {
		t.Errorf("the kernel has %v", got)
	}
	if got := r.srv.Names(testID)[0].Expires; got.Sub(expires).Abs() > time.Second {
		t.Errorf("the lease lasts until %s, want %s", got, expires)
	}
	r.consistent()
	if err := r.srv.Stop(testID); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(r.dir, testID)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the journal outlives Stop: %v", err)
	}
	if err := r.srv.Stop(testID); err != nil {
		t.Errorf("a second Stop: %v", err)
	}
	if _, err := r.srv.journalPath("../x"); err == nil {
		t.Error("an id may leave the directory")
	}
}

// While no process runs, nobody tells the kernel the time: an address that a
// flow has used all along looks as if it had been idle since.
func TestFlowThatOutlivedTheProcess(t *testing.T) {
	z := newZone("www.example.com. 1 A 93.184.216.34", "b.cdn.example.com. 1 A 93.184.216.35")
	p := compile(t, webRules)
	short := func(c *Config) { c.Floor, c.Cap, c.Idle = time.Second, time.Second, 200*time.Millisecond }
	r := newRig(t, p, z, short)
	r.ask("www.example.com", mdns.TypeA)
	r.ask("b.cdn.example.com", mdns.TypeA)
	if err := r.srv.Close(); err != nil {
		t.Fatal(err)
	}
	r.tb.set(func() { r.tb.used[netip.MustParseAddr("93.184.216.34")] = 10 * time.Minute })
	time.Sleep(2100 * time.Millisecond) // both have expired
	r.open(p, short)
	r.sb.expire(time.Now())
	if got := r.tb.has(); !slices.Equal(got, []string{"93.184.216.34"}) {
		t.Errorf("after the restart the kernel has %v, want what was in use", got)
	}
	time.Sleep(300 * time.Millisecond)
	r.sb.expire(time.Now().Add(time.Second))
	if got := r.tb.has(); len(got) != 0 {
		t.Errorf("idle for long enough, and still there: %v", got)
	}
	r.consistent()
}
