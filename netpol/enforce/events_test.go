// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// follower collects the flow log.
type follower struct {
	mu   sync.Mutex
	list []Event
	end  func() error // ends Events and answers what it did
}

// follow begins to read the flow log of e. mark makes a sandbox send what is in
// the log then; what came before is not in the list.
func follow(t testing.TB, e *Enforcer, mark func()) *follower {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	f := &follower{}
	done := make(chan error, 1)
	go func() {
		done <- e.Events(ctx, func(ev Event) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.list = append(f.list, ev)
		})
	}()
	f.end = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { _ = f.end() })
	eventually(t, func() string {
		step(e)
		mark()
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.list) == 0 {
			return "the flow log is not read"
		}
		return ""
	})
	time.Sleep(20 * time.Millisecond)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list = nil
	return f
}

// last answers the newest event that is like want in all but the fields that
// differ each time, and how many there were.
func (f *follower) last(want Event) (last Event, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, ev := range f.list {
		same := ev
		same.Time, same.Bytes, same.TotalPackets, same.TotalBytes = want.Time, want.Bytes, want.TotalPackets, want.TotalBytes
		if same == want {
			last = ev
			n++
		}
	}
	return last, n
}

// step moves the tick, as if a second had passed.
func step(e *Enforcer) { atomic.AddUint64(&e.state.values[0].Tick, 1000) }

func TestEvents(t *testing.T) {
	e := unit(t, "- {name: web, action: allow, to: [{cidr: 192.0.2.0/24}, {cidr: '2001:db8::/32'}], ports: [443/tcp]}\n"+
		"- {name: no25, action: deny, to: [{cidr: 192.0.2.0/24}], ports: [25/tcp]}\n")
	run(t, e.fromSandbox, frame{dst: addr4(9)}.bytes(), 0) // before anybody listens
	f := follow(t, e, func() { run(t, e.fromSandbox, frame{dst: dst4, ether: 0x0806}.bytes(), 0) })
	base := Event{ID: testID, Slot: testSlot, Proto: netpol.TCP, Peer: dst4, LocalPort: 50000, PeerPort: 443, Reason: "allow", Tenant: "acme", Rule: "web"}
	with := func(change func(*Event)) Event {
		ev := base
		change(&ev)
		return ev
	}
	inbound := frame{src: addr6(7), dst: addr6(testSlot), udp: true, port: 1234}
	cases := []struct {
		name string
		want Event
		prog *ebpf.Program
		data []byte
	}{
		{"allow", base, e.fromSandbox, frame{dst: dst4, payload: 100}.bytes()},
		{"deny", with(func(ev *Event) { ev.Rule, ev.Reason, ev.PeerPort = "no25", "rule_deny", 25 }), e.fromSandbox, frame{dst: dst4, port: 25}.bytes()},
		{"no rule", with(func(ev *Event) { ev.Tenant, ev.Rule, ev.Reason, ev.PeerPort, ev.Peer = "", "", "no_rule", 80, dst6 }),
			e.fromSandbox, frame{dst: dst6, port: 80}.bytes()},
		{"spoof", with(func(ev *Event) {
			*ev = Event{ID: testID, Slot: testSlot, Reason: "spoof_mac"}
		}), e.fromSandbox, frame{dst: dst4, srcMAC: []byte{0x02, 0x62, 0x68, 0, 0, 2}}.bytes()},
		{"inbound", with(func(ev *Event) {
			*ev = Event{ID: testID, Slot: testSlot, Reason: "in_sandbox", Inbound: true, Proto: netpol.UDP, Peer: addr6(7), LocalPort: 1234, PeerPort: 50000}
		}), e.toSandbox, inbound.toSandbox()},
	}
	const each = 40
	var first, second [10]Event
	for round := range 2 {
		if round == 1 {
			time.Sleep(1100 * time.Millisecond)
			step(e)
		}
		start := time.Now()
		for range each {
			for _, c := range cases {
				run(t, c.prog, c.data, 0)
			}
		}
		for i, c := range cases {
			eventually(t, func() string {
				ev, n := f.last(c.want)
				if n < round+1 {
					return fmt.Sprintf("%s: %d events, want %d like %+v in %+v", c.name, n, round+1, c.want, f.list)
				}
				if late := ev.Time.Sub(start); ev.Bytes != uint64(len(c.data)-14) || late < 0 || late > 3*time.Second {
					return fmt.Sprintf("%s: got %+v, sent at %s", c.name, ev, start)
				}
				if round == 0 {
					first[i] = ev
				} else {
					second[i] = ev
				}
				return ""
			})
		}
	}
	// The totals tell what was left out. An event was read after its packet and
	// perhaps after more of the same.
	for i, c := range cases {
		between := second[i].TotalPackets - first[i].TotalPackets
		if first[i].TotalPackets < 1 || second[i].TotalPackets > 2*each || between < 1 || between > 2*each-1 {
			t.Errorf("%s: totals %d, then %d, of %d packets", c.name, first[i].TotalPackets, second[i].TotalPackets, 2*each)
		}
		if size := uint64(len(c.data) - 14); second[i].TotalBytes != second[i].TotalPackets*size {
			t.Errorf("%s: %d bytes in %d packets of %d", c.name, second[i].TotalBytes, second[i].TotalPackets, size)
		}
		// Few a second, however many packets.
		if _, n := f.last(c.want); n > 12 {
			t.Errorf("%s: %d events", c.name, n)
		}
	}
	time.Sleep(1100 * time.Millisecond)
	step(e)
	for _, c := range cases {
		run(t, c.prog, c.data, 0)
		eventually(t, func() string {
			if ev, _ := f.last(c.want); ev.TotalPackets != 2*each+1 {
				return fmt.Sprintf("%s: total %d, want %d", c.name, ev.TotalPackets, 2*each+1)
			}
			return ""
		})
	}
	if ev, n := f.last(Event{ID: testID, Slot: testSlot, Proto: netpol.TCP, Peer: addr4(9), LocalPort: 50000, PeerPort: 443, Reason: "sandbox"}); n != 0 {
		t.Errorf("an event from before: %+v", ev)
	}
	ok(t, f.end())
}

// A log that nobody reads fills up. That is counted, and changes no verdict and
// no counter; who reads next gets what is new.
func TestEventsLost(t *testing.T) {
	e := unit(t, allowAll)
	const packets = 20000 // the log has room for 14563
	pass, denied := frame{dst: dst4}.bytes(), frame{dst: addr4(9)}.bytes()
	for range packets / 2 {
		step(e)
		if got := run(t, e.fromSandbox, pass, 0); got.ret != next {
			t.Fatalf("got %d", got.ret)
		}
		if got := run(t, e.fromSandbox, denied, 0); got.ret != drop {
			t.Fatalf("got %d", got.ret)
		}
	}
	lost, err := e.EventsLost()
	ok(t, err)
	if lost < packets-14563-10 || lost > packets-14000 {
		t.Errorf("%d events are lost of %d", lost, packets)
	}
	if got := counters(t, e, testSlot).EgressPackets; got != packets/2 {
		t.Errorf("counted %d packets, want %d", got, packets/2)
	}
	if got := drops(t, e, testSlot)["sandbox"]; got != packets/2 {
		t.Errorf("counted %d drops, want %d", got, packets/2)
	}
	f := follow(t, e, func() { run(t, e.fromSandbox, frame{dst: dst4, ether: 0x0806}.bytes(), 0) })
	step(e)
	run(t, e.fromSandbox, pass, 0)
	eventually(t, func() string {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.list) != 1 || f.list[0].TotalPackets != packets/2+1 {
			return fmt.Sprintf("got %+v", f.list)
		}
		return ""
	})
}

// Events of a sandbox that is gone, and of links of none, are left out.
func TestEventsOfTheGone(t *testing.T) {
	w := newPair(t, compile(t, allowAll))
	f := follow(t, w.e, w.mark(t))
	raw := bpf.DatapathBhEvent{Slot: 1, Epoch: w.e.shm.values[1].Epoch, Rule: cbNoRule}
	if _, known, err := w.e.event(raw); err != nil || !known {
		t.Errorf("event of slot 1: %v, %v", known, err)
	}
	raw.Epoch++
	if ev, known, err := w.e.event(raw); err != nil || known {
		t.Errorf("event of another epoch: %+v, %v", ev, err)
	}
	raw.Slot = 0
	if ev, known, err := w.e.event(raw); err != nil || known {
		t.Errorf("event of no slot: %+v, %v", ev, err)
	}
	// Close ends who listens.
	ok(t, w.e.Close())
	if err := f.end(); !errors.Is(err, ErrClosed) && err != nil {
		t.Errorf("events after close: got %v", err)
	}
	if err := w.e.Events(context.Background(), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("events of a closed enforcer: got %v", err)
	}
}

func TestCloseEndsEvents(t *testing.T) {
	e := unit(t, allowAll)
	done := make(chan error, 1)
	go func() { done <- e.Events(context.Background(), func(Event) {}) }()
	time.Sleep(20 * time.Millisecond)
	ok(t, e.Close())
	select {
	case err := <-done:
		if !errors.Is(err, ErrClosed) {
			t.Errorf("got %v, want ErrClosed", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("it goes on")
	}
}

// The tick is the time since boot while the pins are open, and stands still
// otherwise.
func TestTick(t *testing.T) {
	cfg := testConfig(t)
	e := open(t, cfg)
	state, err := ebpf.LoadPinnedMap(e.mapPin("state"), nil)
	ok(t, err)
	defer state.Close()
	tick := func() uint64 {
		var s bpf.DatapathBhState
		ok(t, state.Lookup(uint32(0), &s))
		return s.Tick
	}
	start := tick()
	for range 2 {
		now, err := bootSeconds()
		ok(t, err)
		if got := tick(); got+2 < now || got > now {
			t.Errorf("tick %d, %d s since boot", got, now)
		}
		time.Sleep(1500 * time.Millisecond)
	}
	if tick() == start {
		t.Error("the tick does not move")
	}
	ok(t, e.Close())
	start = tick()
	time.Sleep(1200 * time.Millisecond)
	if got := tick(); got != start || got == 0 {
		t.Errorf("tick after close: %d, then %d", start, got)
	}
	open(t, cfg)
}

// What a policy that only watches lets pass is written down, by destination,
// and is told as what it would have been.
func TestAudited(t *testing.T) {
	p := compile(t, "- {name: web, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [443/tcp]}\n"+
		"- {name: no25, action: deny, to: [{cidr: 192.0.2.0/24}], ports: [25/tcp]}\nmode: audit\n")
	w := newPair(t, p)
	f := follow(t, w.e, w.mark(t))
	send := func(n uint32, fr frame, times int) {
		t.Helper()
		left := times
		packets, _, err := w.send(n, fr, func(bool) bool { left--; return left > 0 })
		ok(t, err)
		if packets != times {
			t.Errorf("%d of %d passed", packets, times)
		}
	}
	send(1, frame{dst: dst4}, 5) // allowed: nothing to note
	send(1, frame{dst: dst4, port: 80}, 3)
	send(1, frame{dst: dst6, port: 53, udp: true, payload: 12}, 2)
	send(1, frame{dst: dst4, port: 25}, 4)
	send(2, frame{dst: dst4, port: 81}, 1)
	if packets, _, err := w.send(1, frame{dst: netip.MustParseAddr("169.254.169.254")}, times(1)); err != nil || packets != 0 {
		t.Errorf("a hard deny passed for audit, %v", err)
	}
	want := []AuditedFlow{
		{Tenant: "acme", Rule: "no25", Dst: dst4, Port: 25, Proto: netpol.TCP, Packets: 4, Bytes: 160},
		{Dst: dst4, Port: 80, Proto: netpol.TCP, Packets: 3, Bytes: 120},
		{Dst: dst6, Port: 53, Proto: netpol.UDP, Packets: 2, Bytes: 120},
	}
	got, err := w.e.Audited(w.id(1), 1)
	ok(t, err)
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("audited flows (-want +got):\n%s", diff)
	}
	for _, ev := range []Event{
		{ID: w.id(1), Slot: 1, Tenant: "acme", Rule: "no25", Reason: "allow", Audit: "rule_deny", Proto: netpol.TCP, Peer: dst4, LocalPort: 50000, PeerPort: 25},
		{ID: w.id(1), Slot: 1, Reason: "allow", Audit: "no_rule", Proto: netpol.TCP, Peer: dst4, LocalPort: 50000, PeerPort: 80},
	} {
		eventually(t, func() string {
			if _, n := f.last(ev); n == 0 {
				return fmt.Sprintf("no event like %+v in %+v", ev, f.list)
			}
			return ""
		})
	}

	// They stay over a restart, and go with the sandbox.
	ok(t, f.end())
	w.restart(t)
	if got, err := w.e.Audited(w.id(1), 1); err != nil || len(got) != 3 {
		t.Errorf("after a restart: %+v, %v", got, err)
	}
	w.detach(t, 1)
	if _, err := w.e.Audited(w.id(1), 1); !errors.Is(err, ErrNotFound) {
		t.Errorf("audited flows of a sandbox that is gone: got %v", err)
	}
	place(t, w.e, sandbox(1, w.index[0], p))
	if got, err := w.e.Audited(w.id(1), 1); err != nil || len(got) != 0 {
		t.Errorf("the next sandbox: %+v, %v", got, err)
	}
}

// Reading goes on while more flows come than one read takes.
func TestAuditedMany(t *testing.T) {
	w := newPair(t, compile(t, allowAll))
	const n = 5000
	for i := range n {
		w.audit(t, uint16(i+1))
	}
	got, err := w.e.Audited(w.id(1), 1)
	ok(t, err)
	if len(got) != n {
		t.Errorf("got %d flows, want %d", len(got), n)
	}
}

// mark makes slot 1 send what is never allowed.
func (w *pair) mark(t testing.TB) func() {
	return func() {
		_, _, err := w.send(1, frame{dst: dst4, ether: 0x0806}, times(1))
		ok(t, err)
	}
}

// audit writes down one packet of slot 1 to a port, as a program does.
func (w *pair) audit(t testing.TB, port uint16) {
	t.Helper()
	dst, err := addrKey(dst4)
	ok(t, err)
	k := bpf.DatapathBhAuditKey{Slot: 1, Epoch: w.e.shm.values[1].Epoch, Rule: cbNoRule, Port: port, Proto: 6, Addr: dst}
	ok(t, w.e.maps["audited"].Put(k, bpf.DatapathBhCount{Packets: 1, Bytes: 40}))
}
