// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
)

func TestRate(t *testing.T) {
	z := newZone(web)
	r := newRig(t, compile(t, webRules), z, func(c *Config) { c.Rate, c.Burst = 0.001, 5 })
	for i := range 10 {
		want := "NOERROR 93.184.216.34"
		if i >= 5 {
			want = "REFUSED (18 more than 0.001 queries a second)"
		}
		if got := told(r.ask("www.example.com", mdns.TypeA)); got != want {
			t.Errorf("query %d: %s", i, got)
		}
	}
	if n := z.asked.Load(); n != 5 || r.srv.Stats(testID).Rate != 5 {
		t.Errorf("asked upstream %d times, counted %d", n, r.srv.Stats(testID).Rate)
	}
	var b bucket
	now := time.Now()
	took := 0
	for i := range 1000 { // ten seconds
		if ok, _ := b.take(now.Add(time.Duration(i)*10*time.Millisecond), 5, 3); ok {
			took++
		}
	}
	if took < 52 || took > 53 {
		t.Errorf("took %d tokens in 10s of 5 a second and 3 at once", took)
	}
	if ok, _ := b.take(now.Add(-time.Hour), 5, 3); ok {
		t.Error("a clock that goes back gives tokens")
	}
}

// A tunnel says something with each new name.
func TestTunnel(t *testing.T) {
	z := newZone(web)
	r := newRig(t, compile(t, webRules), z, func(c *Config) { c.NamesPerMinute = 10 })
	ask := func(name, want string) {
		t.Helper()
		if got := told(r.ask(name, mdns.TypeA)); got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
	for i := range 10 {
		ask(fmt.Sprintf("n%d.cdn.example.com", i), "NXDOMAIN")
	}
	ask("n10.cdn.example.com", "REFUSED (18 more than 10 different names a minute under one rule)")
	ask("n3.cdn.example.com", "NXDOMAIN") // known
	ask("www.example.com", "NOERROR 93.184.216.34")
	if s := r.srv.Stats(testID); s.Tunnel != 1 || z.asked.Load() != 12 {
		t.Errorf("counted %d, asked upstream %d times", s.Tunnel, z.asked.Load())
	}
	r.sb.distinct.mu.Lock()
	r.sb.distinct.minute = time.Now().Add(-time.Minute)
	r.sb.distinct.mu.Unlock()
	ask("n10.cdn.example.com", "NXDOMAIN")
}

func TestEventsAreBounded(t *testing.T) {
	r := newRig(t, compile(t, webRules), newZone(web), nil)
	for range 200 {
		r.ask("www.example.org", mdns.TypeA)
	}
	r.ask("www.example.com", mdns.TypeA)
	got := r.outcomes()
	if len(got) < eventBurst || len(got) > eventBurst+10 || got[len(got)-1] != OutcomeAnswered {
		t.Errorf("%d events, the last is %s", len(got), got[len(got)-1])
	}
	if n := r.srv.Stats(testID).EventsSuppressed; n != 201-uint64(len(got)) {
		t.Errorf("%d suppressed, %d seen", n, len(got))
	}
	r.sb.eventsOther.mu.Lock()
	r.sb.eventsOther.used = 0
	missed := r.sb.eventsOther.silent
	r.sb.eventsOther.mu.Unlock()
	r.ask("www.example.org", mdns.TypeA)
	if last := r.events[len(r.events)-1]; last.Suppressed != missed || missed == 0 {
		t.Errorf("the next event says %d suppressed, want %d", last.Suppressed, missed)
	}
}

func TestInFlight(t *testing.T) {
	r := newRig(t, compile(t, webRules), newZone(web), func(c *Config) { c.InFlight = 3 })
	for i := range 5 {
		if got := r.sb.begin(); got != (i < 3) {
			t.Errorf("query %d: %v", i, got)
		}
	}
	r.sb.done()
	if !r.sb.begin() || r.srv.Stats(testID).Dropped != 2 {
		t.Errorf("dropped %d", r.srv.Stats(testID).Dropped)
	}
}

// A panic ends one query.
func TestPanic(t *testing.T) {
	r := newRig(t, compile(t, webRules), nil, nil)
	r.srv.up = replier(func(string, uint16) *mdns.Msg { panic("bad message") })
	defer func() {
		if p := recover(); p != nil {
			t.Errorf("a query ended the process: %v", p)
		}
	}()
	if m := r.ask("www.example.com", mdns.TypeA); m != nil || r.srv.Stats(testID).Panics != 1 {
		t.Error(told(m), r.srv.Stats(testID).Panics)
	}
	r.srv.up = newZone(web)
	if got := told(r.ask("www.example.com", mdns.TypeA)); got != "NOERROR 93.184.216.34" {
		t.Error(got)
	}
}

// Whatever is cut off or changed in a journal, what is before it holds, and
// nothing else comes of it.
func TestJournalDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	j := journal{path: path}
	st := newState()
	if err := j.rewrite(st); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for i := range 5 {
		rec := record{Name: fmt.Sprintf("n%d.example.com", i), Seen: now.UnixMilli(), Addrs: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", i))}, Expires: []int64{now.Add(time.Minute).UnixMilli()}}
		if err := j.append(st, rec); err != nil {
			t.Fatal(err)
		}
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(whole), "\n")
	check := func(b []byte, at int, what string) {
		t.Helper()
		want, size := -1, 0 // records before the damage; the first line is none
		for _, l := range lines {
			if size += len(l); size > at {
				break
			}
			want++
		}
		st, torn := decodeJournal(b, now, time.Hour)
		if len(st.names) != max(want, 0) || torn == 0 && len(b) > 0 && what == "changed" {
			t.Errorf("%s at %d: %d names, want %d; %d bytes torn", what, at, len(st.names), want, torn)
		}
	}
	for at := range whole {
		check(whole[:at], at, "cut")
		b := append([]byte(nil), whole...)
		b[at] ^= 0x01
		check(b, at, "changed")
	}
	if st, torn := decodeJournal(whole, now, time.Hour); len(st.names) != 5 || torn != 0 {
		t.Errorf("whole: %d names, %d torn", len(st.names), torn)
	}
	// A clock that was set back must not make a lease last for ever.
	st, _ = decodeJournal(whole, now.Add(-24*time.Hour), time.Hour)
	if last := st.nextExpiry(); last.After(now.Add(-24*time.Hour + time.Hour + releaseSlack)) {
		t.Errorf("lease until %s", last)
	}
}

// After a write that failed half way nothing may be appended behind the half.
func TestJournalFull(t *testing.T) {
	now := time.Now()
	rec := func(name string) record {
		return record{Name: name, Seen: now.UnixMilli(), Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Expires: []int64{now.UnixMilli()}}
	}
	j, st := journal{path: "/dev/full"}, newState()
	if err := j.append(st, rec("a.example.com")); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("a full disk: %v", err)
	}
	j.path = filepath.Join(t.TempDir(), "j")
	half, err := encode(appendLine(nil, []byte(journalVersion)), []record{rec("a.example.com")})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(j.path, half[:len(half)-3], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := j.append(st, rec("b.example.com")); err != nil {
		t.Fatal(err)
	}
	back, torn, err := readJournal(j.path, now, time.Hour)
	if err != nil || torn != 0 || len(back.names) != 1 || back.names["b.example.com"] == nil {
		t.Errorf("names %v, %d bytes torn, %v", back.names, torn, err)
	}
}

func TestJournalIsCompacted(t *testing.T) {
	r := newRig(t, compile(t, webRules), newZone(web), nil)
	for range 3000 {
		r.ask("www.example.com", mdns.TypeA)
	}
	info, err := os.Stat(filepath.Join(r.dir, testID))
	if err != nil || info.Size() > compactAt+1024 {
		t.Errorf("%d bytes for one name, %v", info.Size(), err)
	}
	r.consistent()
	if _, err := os.Stat(filepath.Join(r.dir, testID+".new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file is left: %v", err)
	}
}

// Queries, changes of policy, failures and expiry at the same time: at every
// moment what was released is open, or has ended since.
func TestConcurrent(t *testing.T) {
	var records []string
	for i := range 30 {
		records = append(records, fmt.Sprintf("n%d.cdn.example.com. 60 A 93.184.216.%d", i, i%10), fmt.Sprintf("n%d.cdn.example.com. 60 A 93.184.217.%d", i, i))
	}
	a := compile(t, webRules)
	b := compile(t, strings.ReplaceAll(webRules, "443/tcp", "8443/tcp"))
	none := compile(t, "- {name: x, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [1/tcp]}\n")
	r := newRig(t, a, newZone(records...), func(c *Config) { c.AddrsPerSandbox = 25; c.NamesPerMinute = 1 << 20 })
	var failing atomic.Bool
	r.tb.set(func() {
		r.tb.fail = func(_ string, n int) error {
			if failing.Load() && n%7 == 0 {
				return errNoMemory
			}
			return nil
		}
	})
	var wg sync.WaitGroup
	var answered atomic.Int64
	for range 4 {
		wg.Go(func() {
			for range 300 {
				if m := r.ask(fmt.Sprintf("n%d.cdn.example.com", rand.IntN(30)), mdns.TypeA); len(m.Answer) > 0 {
					answered.Add(1)
				}
			}
		})
	}
	stop := make(chan struct{})
	var others sync.WaitGroup
	others.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			p := []netpol.Program{a, b, none}[i%3]
			if err := r.srv.Swap(testID, p, func(l []netpol.Learned) error { return r.tb.swapped(p, l) }); err != nil {
				t.Error(err)
			}
			failing.Store(i%2 == 0)
			r.sb.expire(time.Now().Add(time.Duration(i%3) * time.Minute))
			r.srv.Names(testID)
			r.srv.Learned(testID, a)
			time.Sleep(time.Millisecond)
		}
	})
	wg.Wait()
	close(stop)
	others.Wait()
	failing.Store(false)
	r.sb.expire(time.Now().Add(retryAfter))
	if err := r.sb.jr.rewrite(r.sb.st); err != nil {
		t.Fatal(err)
	}
	r.consistent()
	if answered.Load() == 0 {
		t.Error("nothing was answered")
	}
}
