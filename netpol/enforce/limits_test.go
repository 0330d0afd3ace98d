// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// skbIfindex is where struct __sk_buff has the device of a test run.
const skbIfindex = 40

// pair is an enforcer and two sandboxes of acme, in slots 1 and 2, whose
// packets are test runs on devices of a namespace.
type pair struct {
	e     *Enforcer
	cfg   Config
	ns    nsHandle
	index []int
}

func newPair(t testing.TB, p netpol.Program) *pair {
	t.Helper()
	ns, index := links(t, 2)
	w := &pair{cfg: testConfig(t), ns: ns, index: index}
	w.e = open(t, w.cfg)
	w.place(t, p)
	return w
}

// place puts both sandboxes under p.
func (w *pair) place(t testing.TB, p netpol.Program) {
	t.Helper()
	for i, index := range w.index {
		place(t, w.e, sandbox(uint32(i+1), index, p))
	}
}

// restart closes the enforcer and opens it again.
func (w *pair) restart(t testing.TB) {
	t.Helper()
	ok(t, w.e.Close())
	w.e = open(t, w.cfg)
}

// id is that of the sandbox in slot n.
func (w *pair) id(n uint32) string { return sandbox(n, 1, netpol.Program{}).ID }

// detach takes all of slot n away.
func (w *pair) detach(t testing.TB, n uint32) {
	t.Helper()
	ok(t, in(w.ns, func() error { return w.e.Detach(w.id(n), n) }))
}

// send runs f of slot n as often as more says, and answers how many passed and
// their l3 bytes.
func (w *pair) send(n uint32, f frame, more func(passed bool) bool) (packets int, bytes uint64, err error) {
	f.srcMAC = sandbox(n, 1, netpol.Program{}).MAC
	if f.dst.IsValid() && f.dst.Is6() {
		f.src = addr6(n)
	} else {
		f.src = addr4(n)
	}
	data := f.bytes()
	ctx := make([]byte, skbSize)
	binary.NativeEndian.PutUint32(ctx[skbIfindex:], uint32(w.index[n-1]))
	err = in(w.ns, func() error {
		for {
			ret, err := w.e.fromSandbox.Run(&ebpf.RunOptions{Data: data, Context: ctx})
			if err != nil {
				return err
			}
			passed := int32(ret) == next
			if passed {
				packets++
				bytes += uint64(len(data) - ethernetHeader)
			}
			if !more(passed) {
				return nil
			}
		}
	})
	return packets, bytes, err
}

// times sends n frames.
func times(n int) func(bool) bool {
	return func(bool) bool { n--; return n > 0 }
}

// until sends until a time.
func until(end time.Time) func(bool) bool {
	return func(bool) bool { return time.Now().Before(end) }
}

// refused sends until a frame is dropped, at most n.
func refused(n int) func(bool) bool {
	return func(passed bool) bool { n--; return passed && n > 0 }
}

// distinct gives a program that was changed by hand another digest.
func distinct(p netpol.Program) netpol.Program {
	p.Digest = sha256.Sum256(fmt.Append(nil, p.Rules, p.Entries, p.Rates, p.Budgets, p.Names))
	return p
}

// withRates is everything allowed, at these rates.
func withRates(t testing.TB, rates ...netpol.ProgramRate) netpol.Program {
	p := compile(t, allowAll)
	p.Rates = rates
	return distinct(p)
}

func tenantRate(bits uint64) netpol.ProgramRate {
	return netpol.ProgramRate{Tenant: "acme", Scope: netpol.ScopeTenant, Bits: bits}
}

func sandboxRate(bits uint64) netpol.ProgramRate {
	return netpol.ProgramRate{Tenant: "acme", Scope: netpol.ScopeSandbox, Bits: bits}
}

// The arithmetic of the programs, cost * bytes >> 20 and tat + cost, holds for
// every rate and every packet.
func TestBucketArithmetic(t *testing.T) {
	for rate := uint64(netpol.MinRate); rate <= 400e9; rate += rate/7 + 1 {
		cost, burst := gcra(rate)
		// 64 KiB in segments of one byte, with the headers that each gets.
		const worst = 65536 * (1 + 60)
		if hi, _ := bits.Mul64(cost, worst); hi != 0 {
			t.Errorf("%d bits: cost of %d bytes overflows", rate, worst)
		}
		const century = 100 * 365 * 24 * 3600 * uint64(1e9)
		if sum, carry := bits.Add64(century, cost*worst>>costShift+burst, 0); carry != 0 || sum < century {
			t.Errorf("%d bits: the clock overflows", rate)
		}
		if full := cost * 65536 >> costShift; full > burst {
			t.Errorf("%d bits: a packet of 64 KiB never fits: %d ns, burst %d ns", rate, full, burst)
		}
		if burst < burstNs {
			t.Errorf("%d bits: burst %d ns", rate, burst)
		}
		got := 8e9 * float64(uint64(1)<<costShift) / float64(cost)
		if diff := got/float64(rate) - 1; diff < 0 || diff > 1e-4 {
			t.Errorf("%d bits: the bucket gives %.0f", rate, got)
		}
	}
	if cost, _ := gcra(1 << 63); cost != 1 {
		t.Errorf("cost of a rate beyond all: got %d, want 1", cost)
	}
}

func TestOwnerText(t *testing.T) {
	long := strings.Repeat("abcdefghij/", 20)
	seen := map[string]bool{}
	for _, c := range []struct {
		tenant, rule string
		bits         uint64
		kept         bool
	}{
		{"acme", "", 0, true}, {"acme", "web", 8000, true}, {"acme/vision", "", 400e9, true}, {"acmeweb", "", 8000, true},
		{long, "", 0, false}, {long, "web", 0, false}, {long + "x", "", 0, false}, {long, "", 1 << 63, false},
	} {
		text := ownerText(c.tenant, c.rule, c.bits)
		if len(text) > 92 || seen[text] {
			t.Errorf("%.20s %s: got %q, %d bytes", c.tenant, c.rule, text, len(text))
		}
		seen[text] = true
		tenant, rule, speed, err := owner(text)
		ok(t, err)
		if speed != c.bits || c.kept && (tenant != c.tenant || rule != c.rule) || !c.kept && tenant != "" {
			t.Errorf("%q: got %q, %q, %d", text, tenant, rule, speed)
		}
	}
	for _, text := range []string{"", "a\x00b", "a\x00b\x00x", "a\x00b\x001\x002"} {
		if _, _, _, err := owner(text); err == nil {
			t.Errorf("owner %q: no error", text)
		}
	}
}

// speed measures how many bits a second pass once the burst is gone. A frame
// that is refused says that it is: from then on no more may pass than the rate
// gives in the time, however long the machine stood still. It tries again if
// the machine was too busy to send as much.
func speed(t *testing.T, want float64, send func(more func(passed bool) bool) (bytes uint64)) {
	t.Helper()
	const span = 500 * time.Millisecond
	const frameBits = 8 * 1100 // less than this is in a bucket that refused one
	var got, most float64
	for range 5 {
		var empty time.Time
		start := time.Now()
		before := start
		send(func(passed bool) bool {
			if !passed {
				empty = before
			}
			before = time.Now()
			return passed && before.Sub(start) < 5*time.Second
		})
		if empty.IsZero() {
			t.Fatal("nothing is refused")
		}
		got = 8 * float64(send(until(empty.Add(span))))
		most = want * time.Since(empty).Seconds()
		if got > most*1.01+frameBits {
			break
		}
		if got > most*0.9 {
			return
		}
	}
	t.Errorf("%.0f bits passed, want %.0f, no more and at most 10 %% less", got, most)
}

func TestRateOfASandbox(t *testing.T) {
	const rate = 4e6 // the burst is 262 ms, for which a busy machine may stand still
	w := newPair(t, withRates(t, sandboxRate(rate)))
	f := frame{dst: dst4, payload: 1000}
	was := drops(t, w.e, 1)
	speed(t, rate, func(more func(bool) bool) uint64 {
		_, bytes, err := w.send(1, f, more)
		ok(t, err)
		return bytes
	})
	if got := drops(t, w.e, 1)["rate"]; got <= was["rate"] {
		t.Errorf("drops for rate: got %d", got)
	}
	// The other one has a bucket of its own, which is full.
	packets, _, err := w.send(2, f, refused(1000))
	ok(t, err)
	if want := burstBytes/1040 - 1; packets < want {
		t.Errorf("burst of the other sandbox: got %d packets, want at least %d", packets, want)
	}
}

// One bucket for all sandboxes of a tenant, IPv6 too.
func TestRateOfATenant(t *testing.T) {
	const rate = 4e6
	w := newPair(t, withRates(t, tenantRate(rate)))
	speed(t, rate, func(more func(bool) bool) (sum uint64) {
		for n, again := 0, true; again; n = 1 - n {
			fifty := times(50)
			_, bytes, err := w.send(uint32(n+1), frame{dst: []netip.Addr{dst4, dst6}[n], payload: 1000}, func(passed bool) bool {
				again = more(passed)
				return again && fifty(passed)
			})
			ok(t, err)
			sum += bytes
		}
		return sum
	})
	for n := range uint32(2) {
		if drops(t, w.e, n+1)["rate"] == 0 {
			t.Errorf("slot %d: no drops", n+1)
		}
	}
}

// A rule's rate stops that rule alone, and each sandbox for itself.
func TestRateOfARule(t *testing.T) {
	const rate = 1e5 // the burst is 128 KiB, 10 s
	p := compile(t, "- {name: web, action: allow, to: [{cidr: 0.0.0.0/0}], ports: [443/tcp]}\n"+
		"- {name: more, action: allow, to: [{cidr: 0.0.0.0/0}], ports: [80/tcp]}\n")
	for i := range p.Rules {
		if p.Rules[i].Name == "web" {
			p.Rules[i].Rate = rate
		}
	}
	w := newPair(t, distinct(p))
	for n := range uint32(2) {
		packets, bytes, err := w.send(n+1, frame{dst: dst4, payload: 1000}, refused(1000))
		ok(t, err)
		if bytes < burstBytes-1040 || bytes > burstBytes*5/4 {
			t.Errorf("slot %d: %d packets, %d bytes passed in one burst, want %d", n+1, packets, bytes, burstBytes)
		}
	}
	if packets, _, err := w.send(1, frame{dst: dst4, port: 80, payload: 1000}, times(500)); err != nil || packets != 500 {
		t.Errorf("other rule: %d of 500 passed, %v", packets, err)
	}
	got, err := w.e.Rates(w.id(1), 1)
	ok(t, err)
	if len(got) != 1 || got[0].Full < 0.7 || got[0].Full > 1 {
		t.Fatalf("rates: got %+v", got)
	}
	got[0].Full = 0
	want := []RateState{{Tenant: "acme", Rule: "web", Scope: netpol.ScopeSandbox, Bits: rate}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rates (-want +got):\n%s", diff)
	}
}

// All levels hold at once: the slowest decides.
func TestRatesOfAllLevels(t *testing.T) {
	w := newPair(t, withRates(t, sandboxRate(1e9), tenantRate(1e5),
		netpol.ProgramRate{Tenant: "acme/vision", Scope: netpol.ScopeSandbox, Bits: 1e9}))
	_, bytes, err := w.send(1, frame{dst: dst4, payload: 1000}, refused(1000))
	ok(t, err)
	if bytes > burstBytes*5/4 {
		t.Errorf("%d bytes passed in one burst, want %d", bytes, burstBytes)
	}
	got, err := w.e.Rates(w.id(1), 1)
	ok(t, err)
	var bits []uint64
	for _, r := range got {
		bits = append(bits, r.Bits)
	}
	if diff := cmp.Diff([]uint64{1e5, 1e9, 1e9}, bits); diff != "" {
		t.Errorf("rates (-want +got):\n%s", diff)
	}
}

// A restart gives nobody a new burst, and what was made is found again and
// freed at the end.
func TestLimitsAfterARestart(t *testing.T) {
	p := compile(t, allowAll)
	long := strings.Repeat("abcdefghij/", 15) + "x" // longer than the kernel object has room for
	p.Rates = []netpol.ProgramRate{tenantRate(1e5), {Tenant: long, Bits: 1e9}}
	p.Budgets = []netpol.ProgramBudget{{Tenant: "acme", Scope: netpol.ScopeSandbox, Bytes: 1e9}}
	p.Rules[0].Rate = 2e6
	p = distinct(p)
	w := newPair(t, netpol.Program{})
	for n := range uint32(2) {
		ok(t, w.e.SetBudget(Budget{Tenant: "acme", Slot: n + 1, Window: 3600, Limit: 1e9}))
	}
	w.place(t, p)
	if _, _, err := w.send(1, frame{dst: dst4, payload: 1000}, refused(1000)); err != nil {
		t.Fatal(err)
	}
	before := w.e.slots[1].limits

	for range 2 {
		w.restart(t)
		packets, _, err := w.send(2, frame{dst: dst4, payload: 1000}, times(100))
		ok(t, err)
		if packets > 80 { // 12 come a second
			t.Errorf("%d packets passed after a restart: the bucket was full again", packets)
		}
	}
	w.place(t, p)
	after := w.e.slots[1].limits
	if diff := cmp.Diff(before, after, cmp.AllowUnexported(limitIDs{})); diff != "" {
		t.Errorf("limits after a restart (-before +after):\n%s", diff)
	}
	got, err := w.e.Rates(w.id(1), 1)
	ok(t, err)
	if len(got) != 3 || got[0].Tenant != long && got[2].Tenant != long {
		t.Errorf("rates: got %+v", got)
	}
	w.detach(t, 1)
	if rates, budgets := w.e.limits.count(); rates == 0 || budgets == 0 {
		t.Errorf("%d rates and %d budgets, but slot 2 has some", rates, budgets)
	}
	w.detach(t, 2)
	w.noLimits(t)
	w.restart(t)
	w.noLimits(t)
}

// count answers how many objects the kernel has.
func (t *limitTable) count() (rates, budgets int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.rate.values {
		rates += int(t.rate.values[i].Used)
	}
	for i := range t.budget.values {
		budgets += int(t.budget.values[i].Used)
	}
	return rates, budgets
}

// noLimits waits until all objects are free.
func (w *pair) noLimits(t *testing.T) {
	t.Helper()
	eventually(t, func() string {
		rates, budgets := w.e.limits.count()
		l := &w.e.limits
		l.mu.Lock()
		defer l.mu.Unlock()
		if rates+budgets > 0 || len(l.rates.free) != len(l.rate.values)-1 || len(l.budgets.free) != len(l.budget.values)-1 {
			return fmt.Sprintf("left: %d rates, %d budgets; free %d of %d and %d of %d", rates, budgets,
				len(l.rates.free), len(l.rate.values)-1, len(l.budgets.free), len(l.budget.values)-1)
		}
		return ""
	})
}

// A new speed is a new bucket once the policy is in force; the old one goes.
// A policy that fails changes nothing.
func TestLimitsFollowThePolicy(t *testing.T) {
	w := newPair(t, withRates(t, tenantRate(1e6), sandboxRate(2e6)))
	rates := func(want int) {
		t.Helper()
		eventually(t, func() string {
			if got, _ := w.e.limits.count(); got != want {
				return fmt.Sprintf("%d buckets, want %d", got, want)
			}
			return ""
		})
	}
	rates(3)
	was := w.e.slots[1].limits

	broken := withRates(t, tenantRate(3e6), sandboxRate(4e6))
	broken.Entries[0].Ports = []netpol.PortRule{{Lo: 1, Hi: 1, Proto: netpol.TCP, Rule: 99}}
	levels := withRates(t, make([]netpol.ProgramRate, 8)...)
	for i := range levels.Rates {
		levels.Rates[i] = netpol.ProgramRate{Tenant: fmt.Sprint("t", i), Bits: 5e6}
	}
	zero := withRates(t, tenantRate(7e6), sandboxRate(0))
	for _, p := range []netpol.Program{broken, levels, zero} {
		if err := w.e.SetPolicy(w.id(1), 1, distinct(p), 2, nil); err == nil {
			t.Fatal("no error")
		}
		rates(3)
	}
	if diff := cmp.Diff(was, w.e.slots[1].limits, cmp.AllowUnexported(limitIDs{})); diff != "" {
		t.Errorf("limits after failures (-want +got):\n%s", diff)
	}

	ok(t, w.e.SetPolicy(w.id(1), 1, withRates(t, tenantRate(8e6), sandboxRate(2e6)), 2, nil))
	rates(4) // slot 2 still has the old one
	ok(t, w.e.SetPolicy(w.id(2), 2, withRates(t, tenantRate(8e6)), 2, nil))
	rates(2)
	ok(t, w.e.SetPolicy(w.id(1), 1, withRates(t), 3, nil))
	w.detach(t, 2)
	rates(0)
	w.noLimits(t)
}

// A bucket is full when it is given out, whatever its earlier owner sent.
func TestBucketOfAnEarlierOwner(t *testing.T) {
	w := newPair(t, withRates(t, sandboxRate(1e5)))
	for n := range uint32(2) {
		_, _, err := w.send(n+1, frame{dst: dst4, payload: 1000}, refused(1000))
		ok(t, err)
		w.detach(t, n+1)
	}
	w.noLimits(t)
	w.place(t, withRates(t, sandboxRate(1e5)))
	for n := range uint32(2) {
		if packets, _, err := w.send(n+1, frame{dst: dst4, payload: 1000}, times(100)); err != nil || packets != 100 {
			t.Errorf("slot %d: %d of 100 packets passed, %v", n+1, packets, err)
		}
	}
}

func TestTooManyLimits(t *testing.T) {
	w := newPair(t, netpol.Program{})
	p := compile(t, allowAll)
	// More than one sandbox can ask for: most are taken by others.
	const most = 100
	pool := &w.e.limits.rates
	others := pool.free[most:]
	pool.free = pool.free[:most:most]
	for i := range most + 1 {
		p.Rules = append(p.Rules, netpol.RuleRef{ID: uint16(len(p.Rules)), Tenant: "acme", Name: fmt.Sprint("r", i), Rate: 1e6})
	}
	if err := w.e.SetPolicy(w.id(1), 1, distinct(p), 2, nil); err == nil {
		t.Error("no error")
	}
	p.Rules = p.Rules[:len(p.Rules)-1]
	ok(t, w.e.SetPolicy(w.id(1), 1, distinct(p), 2, nil))
	ok(t, w.e.SetPolicy(w.id(1), 1, withRates(t), 3, nil))
	eventually(t, func() string {
		w.e.limits.mu.Lock()
		defer w.e.limits.mu.Unlock()
		if len(pool.free) != most {
			return fmt.Sprintf("%d of %d rates are free", len(pool.free), most)
		}
		pool.free = append(pool.free, others...)
		return ""
	})
	w.noLimits(t)
	if _, err := w.e.Rates("nobody", 1); !errors.Is(err, ErrNotFound) {
		t.Errorf("rates of nobody: got %v", err)
	}
}

// Whatever comes and goes at once, at the end nothing is left.
func TestLimitsUnderChurn(t *testing.T) {
	const sandboxes = 8
	e := open(t, testConfig(t))
	programs := []netpol.Program{withRates(t), withRates(t, tenantRate(1e6)), withRates(t, tenantRate(2e6), sandboxRate(3e6))}
	for i := range programs {
		p := compile(t, allowAll)
		p.Rates, p.Rules[i%2].Rate = programs[i].Rates, uint64(i)*1e6
		p.Budgets = []netpol.ProgramBudget{tenantBudget(), sandboxBudget()}
		programs = append(programs, distinct(p))
	}
	var wg sync.WaitGroup
	errs := make(chan error, sandboxes)
	for i := range sandboxes {
		wg.Go(func() {
			errs <- func() error {
				for round := range 30 {
					sb := sandbox(uint32(i+1), 1000+i, programs[(i+round)%len(programs)])
					if err := e.SetBudget(Budget{Tenant: "acme", Slot: sb.Slot, Window: uint64(round + 1), Limit: 1e6}); err != nil {
						return err
					}
					s := &e.slots[sb.Slot]
					s.mu.Lock()
					err := errors.Join(e.takeSlot(s, sb), e.setPolicy(s, sb.Slot, sb.Program, 1, nil))
					s.mu.Unlock()
					if err != nil {
						return err
					}
					for j := range 3 {
						if err := e.SetPolicy(sb.ID, sb.Slot, programs[(i+round+j)%len(programs)], 2, nil); err != nil {
							return err
						}
						if _, err := e.Rates(sb.ID, sb.Slot); err != nil {
							return err
						}
						if _, err := e.Budgets(); err != nil {
							return err
						}
					}
					if err := e.Detach(sb.ID, sb.Slot); err != nil {
						return err
					}
				}
				return nil
			}()
		})
	}
	wg.Wait()
	for range sandboxes {
		ok(t, <-errs)
	}
	eventually(t, func() string {
		rates, budgets := e.limits.count()
		l := &e.limits
		l.mu.Lock()
		defer l.mu.Unlock()
		if rates != 0 || budgets > 1 || len(l.rates.refs)+len(l.budgets.refs) != 0 {
			return fmt.Sprintf("left: %d rates and %d budgets, %v and %v held", rates, budgets, l.rates.refs, l.budgets.refs)
		}
		return ""
	})
}
