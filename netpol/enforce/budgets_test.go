// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// What the CPUs of the machine may have leased of a budget and not spent.
const slackPerCPU = 64 << 10

func tenantBudget() netpol.ProgramBudget {
	return netpol.ProgramBudget{Tenant: "acme", Scope: netpol.ScopeTenant, Bytes: 1, Per: netpol.PerHour}
}

func sandboxBudget() netpol.ProgramBudget {
	return netpol.ProgramBudget{Tenant: "acme", Scope: netpol.ScopeSandbox, Bytes: 1, Per: netpol.PerHour}
}

// withBudgets is everything allowed, as far as these budgets reach.
func withBudgets(t testing.TB, budgets ...netpol.ProgramBudget) netpol.Program {
	p := compile(t, allowAll)
	p.Budgets = budgets
	return distinct(p)
}

// budget answers the one of acme with this slot.
func (w *pair) budget(t testing.TB, slot uint32) BudgetState {
	t.Helper()
	all, err := w.e.Budgets()
	ok(t, err)
	for _, b := range all {
		if b.Tenant == "acme" && b.Slot == slot {
			return b
		}
	}
	t.Fatalf("slot %d has no budget: %+v", slot, all)
	return BudgetState{}
}

func (w *pair) set(t testing.TB, b Budget) {
	t.Helper()
	b.Tenant = "acme"
	ok(t, w.e.SetBudget(b))
}

// drain sends from both sandboxes in turn until both are refused.
func (w *pair) drain(t testing.TB) (sum uint64) {
	t.Helper()
	for range 2 {
		for n := range uint32(2) {
			_, bytes, err := w.send(n+1, frame{dst: dst4, payload: 1360}, refused(100000))
			ok(t, err)
			sum += bytes
		}
	}
	return sum
}

// A tenant's sandboxes share its budget to the byte, whoever restarts.
func TestBudgetOfATenant(t *testing.T) {
	const limit, window = 3 << 20, 7200
	w := newPair(t, netpol.Program{})
	w.set(t, Budget{Window: window, Limit: limit})
	p := withBudgets(t, tenantBudget())
	w.place(t, p)
	var sum uint64
	for i := range 400 {
		f := frame{dst: dst4, payload: i}
		if i%3 == 0 {
			f.dst = dst6
		}
		packets, bytes, err := w.send(uint32(i%2+1), f, times(1))
		ok(t, err)
		if packets != 1 {
			t.Fatalf("frame %d was dropped", i)
		}
		sum += bytes
	}
	want := BudgetState{Tenant: "acme", Window: window, Limit: limit, Spent: sum}
	if diff := cmp.Diff(want, w.budget(t, 0)); diff != "" {
		t.Errorf("budget (-want +got):\n%s", diff)
	}

	w.restart(t)
	if diff := cmp.Diff(want, w.budget(t, 0)); diff != "" {
		t.Errorf("budget after a restart (-want +got):\n%s", diff)
	}
	w.set(t, Budget{Window: window, Limit: limit, Spent: 12345}) // not used: the kernel knows better
	w.place(t, p)
	sum += w.drain(t)
	if sum > limit || sum < limit-1400-2*slackPerCPU {
		t.Errorf("%d bytes passed of %d", sum, limit)
	}
	want.Spent = sum
	if diff := cmp.Diff(want, w.budget(t, 0)); diff != "" {
		t.Errorf("budget at its end (-want +got):\n%s", diff)
	}
	for n := range uint32(2) {
		if got := drops(t, w.e, n+1)["budget"]; got != 2 {
			t.Errorf("slot %d: drops for budget: got %d, want 2", n+1, got)
		}
		if got := counters(t, w.e, n+1).EgressBytes; got == 0 || got > sum {
			t.Errorf("slot %d: counted %d bytes", n+1, got)
		}
	}

	// A new window is whole, and has none of the old one's leases.
	w.set(t, Budget{Window: window + 3600, Limit: limit / 2})
	if got := w.budget(t, 0); got.Spent != 0 || got.Limit != limit/2 {
		t.Errorf("new window: got %+v", got)
	}
	sum = w.drain(t)
	if sum > limit/2 || sum < limit/2-1400-2*slackPerCPU || w.budget(t, 0).Spent != sum {
		t.Errorf("%d bytes passed of %d in the new window, spent %d", sum, limit/2, w.budget(t, 0).Spent)
	}

	// A higher limit opens what it adds; a lower one takes.
	w.set(t, Budget{Window: window + 3600, Limit: limit})
	sum += w.drain(t)
	if sum > limit || sum < limit-1400-2*slackPerCPU {
		t.Errorf("%d bytes passed of %d after the limit was raised", sum, limit)
	}
	w.set(t, Budget{Window: window + 3600, Limit: limit / 4})
	if packets, _, err := w.send(1, frame{dst: dst4, payload: 1400}, times(50)); err != nil || packets > slackPerCPU/1440 {
		t.Errorf("%d packets passed a limit that is spent four times, %v", packets, err)
	}
	if got := w.budget(t, 0); got.Spent < sum || got.Spent > sum+slackPerCPU || got.Limit != limit/4 {
		t.Errorf("lower limit: got %+v, %d bytes passed", got, sum)
	}
}

// What was spent before the kernel knew of a window counts.
func TestBudgetThatWasSpentBefore(t *testing.T) {
	w := newPair(t, netpol.Program{})
	w.set(t, Budget{Window: 100, Limit: 1 << 20, Spent: 1<<20 - 10000})
	w.place(t, withBudgets(t, tenantBudget()))
	sum := w.drain(t)
	if sum > 10000 || sum < 10000-1400-2*(10000/64) {
		t.Errorf("%d bytes passed of 10000", sum)
	}
	if got := w.budget(t, 0).Spent; got != 1<<20-10000+sum {
		t.Errorf("spent %d, want %d", got, 1<<20-10000+sum)
	}
	w.set(t, Budget{Window: 200, Limit: 1 << 20, Spent: 5 << 20})
	if sum := w.drain(t); sum != 0 {
		t.Errorf("%d bytes passed of a budget that is overdrawn", sum)
	}
	if got := w.budget(t, 0).Spent; got != 5<<20 {
		t.Errorf("spent: got %d", got)
	}
}

// A policy whose budget nobody has set lets nothing pass.
func TestBudgetThatNobodySet(t *testing.T) {
	w := newPair(t, withBudgets(t, sandboxBudget()))
	if sum := w.drain(t); sum != 0 {
		t.Errorf("%d bytes passed", sum)
	}
	if all, err := w.e.Budgets(); err != nil || len(all) != 0 {
		t.Errorf("budgets: got %+v, %v", all, err)
	}
	w.set(t, Budget{Slot: 1, Window: 100, Limit: 1 << 20})
	if sum := w.drain(t); sum == 0 || w.budget(t, 1).Spent != sum {
		t.Errorf("%d bytes passed, spent %+v", sum, w.budget(t, 1))
	}
	for name, b := range map[string]Budget{
		"no tenant": {Window: 1, Limit: 1}, "no window": {Tenant: "acme", Limit: 1},
		"slot": {Tenant: "acme", Slot: 65, Window: 1}, "window": {Tenant: "acme", Window: 1 << 60},
	} {
		if err := w.e.SetBudget(b); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// The tighter budget decides, and what the other had taken is given back.
func TestBudgetsOfAllLevels(t *testing.T) {
	w := newPair(t, netpol.Program{})
	w.set(t, Budget{Window: 100, Limit: 1 << 20})
	w.set(t, Budget{Slot: 1, Window: 100, Limit: 100000})
	w.set(t, Budget{Slot: 2, Window: 100, Limit: 1 << 30})
	w.place(t, withBudgets(t, tenantBudget(), sandboxBudget()))
	_, one, err := w.send(1, frame{dst: dst4, payload: 1360}, times(500))
	ok(t, err)
	_, two, err := w.send(2, frame{dst: dst4, payload: 1360}, times(2000))
	ok(t, err)
	if one > 100000 || one < 95000 {
		t.Errorf("slot 1 sent %d of 100000", one)
	}
	for slot, want := range map[uint32]uint64{0: one + two, 1: one, 2: two} {
		if got := w.budget(t, slot).Spent; got != want {
			t.Errorf("slot %d: spent %d, want %d", slot, got, want)
		}
	}
}

// The next sandbox of a slot has its own budget, even if the kernel may still
// be looking at the old one. That of a tenant stays while there is room.
func TestBudgetsOfSandboxesThatAreGone(t *testing.T) {
	w := newPair(t, netpol.Program{})
	set := func() {
		w.set(t, Budget{Window: 100, Limit: 1 << 20})
		for n := range uint32(2) {
			w.set(t, Budget{Slot: n + 1, Window: 100, Limit: 1 << 20})
		}
	}
	set()
	p := withBudgets(t, tenantBudget(), sandboxBudget())
	w.place(t, p)
	sum := w.drain(t)
	w.detach(t, 1)
	w.detach(t, 2)
	set()
	w.place(t, p)
	if got := w.budget(t, 1); got.Spent != 0 {
		t.Errorf("new sandbox: got %+v", got)
	}
	if got := w.budget(t, 0); got.Spent != sum {
		t.Errorf("tenant: got %+v, want %d spent", got, sum)
	}

	// Nor has it what CPUs had leased of the old one's.
	w.set(t, Budget{Window: 100, Limit: 1 << 30})
	for n := range uint32(2) {
		if packets, _, err := w.send(n+1, frame{dst: dst4}, times(1)); err != nil || packets != 1 {
			t.Errorf("slot %d: %d packets passed, %v", n+1, packets, err)
		}
		w.detach(t, n+1)
	}
	w.onlyTenants(t)

	// One that was set for a launch that failed before Attach goes, too.
	w.set(t, Budget{Slot: 1, Window: 100, Limit: 1 << 20})
	ok(t, w.e.Detach("neverattach", 1))
	w.onlyTenants(t)
	for n := range uint32(2) {
		w.set(t, Budget{Slot: n + 1, Window: 100, Limit: 10000})
	}
	w.place(t, p)
	for n := range uint32(2) {
		if _, bytes, err := w.send(n+1, frame{dst: dst4, payload: 1360}, times(100)); err != nil || bytes > 10000 {
			t.Errorf("slot %d: %d bytes passed of 10000, %v", n+1, bytes, err)
		}
		w.detach(t, n+1)
	}
	w.onlyTenants(t)
	most := 2 * int(w.cfg.MaxSandboxes)
	for i := range most {
		if err := w.e.SetBudget(Budget{Tenant: fmt.Sprint("t", i), Window: 200, Limit: 1}); err != nil {
			t.Fatalf("budget %d: %v", i, err)
		}
	}
	all, err := w.e.Budgets()
	ok(t, err)
	for _, b := range all {
		if b.Tenant == "acme" {
			t.Error("the oldest budget that nobody uses was not the first to go")
		}
	}
	w.restart(t)
	if got, err := w.e.Budgets(); err != nil || len(got) != most {
		t.Errorf("after a restart: %d budgets, %v, want %d", len(got), err, most)
	}
}

// onlyTenants waits until nobody holds a budget and only one is left.
func (w *pair) onlyTenants(t testing.TB) {
	t.Helper()
	eventually(t, func() string {
		_, budgets := w.e.limits.count()
		l := &w.e.limits
		l.mu.Lock()
		defer l.mu.Unlock()
		if budgets != 1 || len(l.budgets.refs) != 0 {
			return fmt.Sprintf("%d budgets and %d held, want that of the tenant, which nobody holds", budgets, len(l.budgets.refs))
		}
		return ""
	})
}

// A crash while a window is set leaves nothing to spend.
func TestBudgetAfterACrash(t *testing.T) {
	w := newPair(t, netpol.Program{})
	w.set(t, Budget{Window: 100, Limit: 1 << 20})
	p := withBudgets(t, tenantBudget())
	w.place(t, p)
	id := w.e.slots[1].limits.budgets[0]
	w.e.limits.budget.values[id].Reserved = 1
	w.restart(t)
	if sum := w.drain(t); sum != 0 {
		t.Errorf("%d bytes passed", sum)
	}
	w.set(t, Budget{Window: 100, Limit: 1 << 20, Spent: 1 << 19})
	if sum := w.drain(t); sum == 0 || sum > 1<<19 {
		t.Errorf("%d bytes passed of %d", sum, 1<<19)
	}
}

// Four senders on all CPUs, while limits and windows change, never send more
// than was granted, and what they sent is what was spent.
func TestBudgetUnderLoad(t *testing.T) {
	const limit = 20 << 20
	w := newPair(t, netpol.Program{})
	w.set(t, Budget{Window: 1, Limit: limit})
	for n := range uint32(2) {
		w.set(t, Budget{Slot: n + 1, Window: 1, Limit: 1 << 40})
	}
	w.place(t, withBudgets(t, tenantBudget(), sandboxBudget()))
	var sent [3]atomic.Uint64
	load := func(during func()) {
		t.Helper()
		var stop atomic.Bool
		var wg sync.WaitGroup
		errs := make(chan error, 4)
		for i := range 4 {
			wg.Go(func() {
				n := uint32(i%2 + 1)
				_, bytes, err := w.send(n, frame{dst: dst4, payload: 700 * i}, func(bool) bool { return !stop.Load() })
				sent[0].Add(bytes)
				sent[n].Add(bytes)
				errs <- err
			})
		}
		during()
		stop.Store(true)
		wg.Wait()
		for range 4 {
			ok(t, <-errs)
		}
	}
	load(func() {
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if b := w.budget(t, 0); b.Spent > limit {
				t.Errorf("spent %d of %d", b.Spent, limit)
			}
			if drops(t, w.e, 1)["budget"] > 2000 && drops(t, w.e, 2)["budget"] > 2000 {
				return
			}
		}
		t.Error("the budget is never spent")
	})
	if got := sent[0].Load(); got > limit || got < limit-4*slackPerCPU {
		t.Errorf("%d bytes passed of %d", got, limit)
	}
	for slot := range uint32(3) {
		if got := w.budget(t, slot).Spent; got != sent[slot].Load() {
			t.Errorf("slot %d: spent %d, want %d", slot, got, sent[slot].Load())
		}
	}

	// 50 windows, each twice as large once it has begun.
	before := sent[0].Load()
	const windows, small = 50, 256 << 10
	load(func() {
		for i := range uint64(windows) {
			w.set(t, Budget{Window: 10 + i, Limit: small})
			time.Sleep(2 * time.Millisecond)
			w.set(t, Budget{Window: 10 + i, Limit: 2 * small})
			time.Sleep(2 * time.Millisecond)
		}
	})
	if got := sent[0].Load() - before; got > windows*2*small || got < windows*small {
		t.Errorf("%d bytes passed in %d windows of %d", got, windows, 2*small)
	}
}

// Who sees a new window sees what it has, and not what the old one had left.
func TestWindowIsSetLast(t *testing.T) {
	var b bpf.DatapathBhBudget
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			window := atomic.LoadUint64(&b.Window) >> windowBits
			if left := atomic.LoadInt64(&b.Left); left < int64(window) {
				t.Errorf("window %d with %d left, which is of an earlier one", window, left)
				return
			}
		}
	})
	for i := range uint64(1e6) {
		setWindow(&b, i, i, 0)
	}
	stop.Store(true)
	wg.Wait()
}
