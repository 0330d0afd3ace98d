// SPDX-License-Identifier: Apache-2.0

package budget

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/netpol"
)

var errBroken = errors.New("broken")

// kernel is a miniature of the egress program's budgets: they outlive a Keeper,
// and what was spent counts only within a window.
type kernel struct {
	mu   sync.Mutex
	have map[place]State
	err  error
	sets int
}

func (k *kernel) SetBudget(s State) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err != nil {
		return k.err
	}
	k.sets++
	at := place{s.Tenant, s.Slot}
	if old, ok := k.have[at]; ok && old.Window == s.Window {
		s.Spent = old.Spent
	}
	k.have[at] = s
	return nil
}

func (k *kernel) Budgets() ([]State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []State
	for _, s := range k.have {
		out = append(out, s)
	}
	return out, k.err
}

// spend sends and answers whether the budget allowed it.
func (k *kernel) spend(tenant string, slot uint32, bytes uint64) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	s, ok := k.have[place{tenant, slot}]
	if !ok || s.Spent+bytes > s.Limit {
		return false
	}
	s.Spent += bytes
	k.have[place{tenant, slot}] = s
	return true
}

// detach forgets what a slot has, and a tenant's with its last sandbox.
func (k *kernel) detach(slot uint32, tenants ...string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	maps.DeleteFunc(k.have, func(p place, _ State) bool { return p.slot == slot })
	for _, t := range tenants {
		delete(k.have, place{t, 0})
	}
}

type disk struct {
	mu   sync.Mutex
	have map[string]Entry
	err  error
	puts int
}

func (d *disk) Budgets() (map[string]Entry, error) { return maps.Clone(d.have), d.err }

func (d *disk) PutBudgets(put map[string]Entry, drop []string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return d.err
	}
	d.puts++
	maps.Copy(d.have, put)
	for _, key := range drop {
		delete(d.have, key)
	}
	return nil
}

// world is a node's kernel, disk and clock, and the keeper of now.
type world struct {
	t      *testing.T
	kernel *kernel
	disk   *disk
	now    time.Time // of the tests that turn by hand
	k      *Keeper
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, kernel: &kernel{have: map[place]State{}}, disk: &disk{have: map[string]Entry{}}, now: at(t, "2026-11-25T12:00:00Z")}
	w.start()
	return w
}

// start lets another agent run.
func (w *world) start() {
	w.t.Helper()
	var err error
	w.k, err = New(Config{Kernel: w.kernel, Store: w.disk, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return w.now }})
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) ensure(id string, slot uint32, budgets ...netpol.ProgramBudget) {
	w.t.Helper()
	if err := w.k.Ensure(id, slot, netpol.Program{Budgets: budgets}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) turn(save bool) string {
	w.t.Helper()
	return w.k.turn(save)
}

func (w *world) state(tenant string, slot uint32) State {
	w.t.Helper()
	s, ok := w.kernel.have[place{tenant, slot}]
	if !ok {
		w.t.Fatalf("the kernel has no budget of %s in slot %d", tenant, slot)
	}
	return s
}

var (
	daily  = netpol.ProgramBudget{Tenant: "acme", Scope: netpol.ScopeTenant, Bytes: 1000, Per: netpol.PerDay}
	hourly = netpol.ProgramBudget{Tenant: "acme", Scope: netpol.ScopeSandbox, Bytes: 100, Per: netpol.PerHour}
)

func TestWindowsRoll(t *testing.T) {
	w := newWorld(t)
	w.ensure("a", 1, daily, hourly)
	w.ensure("b", 2, daily, hourly)
	if !w.kernel.spend("acme", 0, 100) || !w.kernel.spend("acme", 1, 100) || w.kernel.spend("acme", 1, 1) {
		t.Fatal("budgets do not hold what was set")
	}
	if w.kernel.have[place{"acme", 2}].Spent != 0 {
		t.Error("a sandbox's budget is spent by another")
	}
	w.now = w.now.Add(59*time.Minute + 59*time.Second)
	w.turn(false)
	if w.kernel.spend("acme", 1, 1) {
		t.Error("an hour began before it was over")
	}
	w.now = w.now.Add(time.Second)
	w.turn(false)
	if !w.kernel.spend("acme", 1, 100) {
		t.Error("an hour is over, and the next did not begin")
	}
	if s := w.state("acme", 0); s.Spent != 100 {
		t.Errorf("the day's %d spent bytes went with the hour, want 100", s.Spent)
	}
	if diff := cmp.Diff(Entry{Window: Start(netpol.PerDay, w.now), Spent: 100}, w.disk.have["tenant/acme"]); diff != "" {
		t.Errorf("a window that begins is on disk: %s", diff)
	}
	sets := w.kernel.sets
	w.turn(false)
	if w.kernel.sets != sets {
		t.Error("a window began twice")
	}
}

// TestSpendingSurvives: kill -9 forgets nothing, a reboot at most what was
// spent since the last write.
func TestSpendingSurvives(t *testing.T) {
	w := newWorld(t)
	w.ensure("a", 1, daily, hourly)
	w.kernel.spend("acme", 0, 600)
	w.kernel.spend("acme", 1, 60)
	w.turn(true)
	w.kernel.spend("acme", 0, 30)
	w.kernel.spend("acme", 1, 30)

	w.start() // after kill -9
	w.ensure("a", 1, daily, hourly)
	if d, h := w.state("acme", 0).Spent, w.state("acme", 1).Spent; d != 630 || h != 90 {
		t.Errorf("after kill -9 %d and %d are spent, want 630 and 90", d, h)
	}

	w.kernel.have = map[place]State{} // a reboot, the sandbox in another slot
	w.start()
	w.ensure("a", 7, daily, hourly)
	if d, h := w.state("acme", 0).Spent, w.state("acme", 7).Spent; d != 600 || h != 60 {
		t.Errorf("after a reboot %d and %d are spent, want the 600 and 60 of the last write", d, h)
	}

	w.now = w.now.Add(24 * time.Hour) // a day without an agent
	w.start()
	w.ensure("a", 7, daily, hourly)
	if d, h := w.state("acme", 0).Spent, w.state("acme", 7).Spent; d != 0 || h != 0 {
		t.Errorf("a day later %d and %d are spent", d, h)
	}
}

// TestTheLastSandboxGoes: the kernel forgets a tenant's budget with its last
// sandbox, the tenant does not get a new one for that.
func TestTheLastSandboxGoes(t *testing.T) {
	for restarts := range 3 {
		w := newWorld(t)
		w.ensure("a", 1, daily, hourly)
		w.kernel.spend("acme", 0, 1000)
		w.kernel.spend("acme", 1, 100)
		if restarts > 0 { // and finds it stopping: nobody asks for its budgets any more
			w.start()
		}
		if err := w.k.Release("a", 1); err != nil {
			t.Fatal(err)
		}
		for key := range w.disk.have {
			if strings.HasPrefix(key, "sandbox/a/") {
				t.Errorf("%d restarts: %s stays on disk", restarts, key)
			}
		}
		w.kernel.detach(1, "acme")
		if err := w.k.Release("a", 1); err != nil {
			t.Errorf("a second release: %v", err)
		}
		if restarts > 1 { // once more: what the kernel had is on disk by now
			w.start()
		}
		w.ensure("b", 1, daily, hourly)
		if w.kernel.spend("acme", 0, 1) {
			t.Errorf("%d restarts: the tenant has a new budget", restarts)
		}
		if !w.kernel.spend("acme", 1, 100) {
			t.Errorf("%d restarts: the next sandbox in the slot got a spent budget", restarts)
		}
	}
}

func TestClockJumpsBack(t *testing.T) {
	for _, c := range []string{"running", "restarted", "rebooted"} {
		w := newWorld(t)
		w.ensure("a", 1, daily)
		w.kernel.spend("acme", 0, 1000)
		w.turn(true)
		w.now = w.now.Add(-48 * time.Hour)
		switch c {
		case "rebooted":
			w.kernel.have = map[place]State{}
			w.start()
		case "restarted":
			w.disk.have = map[string]Entry{} // the kernel alone knows
			w.start()
		}
		w.ensure("a", 1, daily)
		warning := w.turn(true)
		if w.kernel.spend("acme", 0, 1) {
			t.Errorf("%s: a spent day is open again", c)
		}
		if !strings.Contains(warning, "clock is behind the budget of tenant acme") || !strings.Contains(warning, "2026-11-26T00:00:00Z") {
			t.Errorf("%s: warning %q", c, warning)
		}
		w.now = w.now.Add(48 * time.Hour) // it has been put right
		if warning := w.turn(true); warning != "" {
			t.Errorf("%s: warning %q with a right clock", c, warning)
		}
		if w.kernel.spend("acme", 0, 1) {
			t.Errorf("%s: the same day began once more", c)
		}
		w.now = w.now.Add(12 * time.Hour)
		w.turn(false)
		if !w.kernel.spend("acme", 0, 1000) {
			t.Errorf("%s: the next day did not begin", c)
		}
	}
}

func TestLimitChanges(t *testing.T) {
	w := newWorld(t)
	w.ensure("a", 1, daily)
	w.kernel.spend("acme", 0, 400)
	less, more := daily, daily
	less.Bytes, more.Bytes = 300, 500
	w.ensure("a", 1, less)
	if w.kernel.spend("acme", 0, 1) {
		t.Error("a lower limit does not hold")
	}
	w.ensure("a", 1, more)
	if !w.kernel.spend("acme", 0, 100) || w.kernel.spend("acme", 0, 1) {
		t.Error("a higher limit forgets what was spent, or does not hold")
	}
	monthly := daily
	monthly.Per = netpol.PerMonth
	w.ensure("a", 1, monthly) // the day's spending stays spent
	if s := w.state("acme", 0); s.Spent != 500 {
		t.Errorf("per month %d are spent, want 500", s.Spent)
	}
	w.now = at(t, "2026-12-01T00:00:00Z")
	w.turn(false)
	if s := w.state("acme", 0); s.Spent != 0 || s.Window != uint64(w.now.Unix()) {
		t.Errorf("the month did not begin: %+v", s)
	}
}

func TestFailures(t *testing.T) {
	w := newWorld(t)
	w.kernel.err = errBroken
	if err := w.k.Ensure("a", 1, netpol.Program{Budgets: []netpol.ProgramBudget{daily}}); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "tenant acme") {
		t.Errorf("ensure: got %v", err)
	}
	w.kernel.err = nil
	w.ensure("a", 1, daily)
	w.kernel.spend("acme", 0, 1000)
	w.now = w.now.Add(24 * time.Hour)
	w.kernel.err = errBroken
	if warning := w.turn(false); !strings.Contains(warning, "cannot be begun anew") {
		t.Errorf("roll: warning %q", warning)
	}
	w.kernel.err = nil
	if w.kernel.spend("acme", 0, 1) {
		t.Error("a window that could not begin is open")
	}
	w.disk.err = errBroken
	if warning := w.turn(false); !strings.Contains(warning, "cannot be recorded") { // it rolls now
		t.Errorf("save: warning %q", warning)
	}
	if err := w.k.Release("a", 1); !errors.Is(err, errBroken) {
		t.Errorf("release: got %v", err)
	}
	w.disk.err = nil
	if err := w.k.Release("a", 1); err != nil {
		t.Errorf("release, once it works: %v", err)
	}
	if warning := w.turn(true); warning != "" {
		t.Errorf("warning %q once all works", warning)
	}
}

// TestRun: windows begin within a second, what was spent is on disk within ten,
// and at the end.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kern, dsk := &kernel{have: map[place]State{}}, &disk{have: map[string]Entry{}}
		var mu sync.Mutex
		warning := "never told"
		k, err := New(Config{Kernel: kern, Store: dsk, Log: slog.New(slog.DiscardHandler), Warn: func(s string) {
			mu.Lock()
			defer mu.Unlock()
			warning = s
		}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		spent := func() uint64 {
			dsk.mu.Lock()
			defer dsk.mu.Unlock()
			return dsk.have["tenant/acme"].Spent
		}
		if err := k.Ensure("a", 1, netpol.Program{Budgets: []netpol.ProgramBudget{daily, hourly}}); err != nil {
			t.Fatal(err)
		}
		kern.spend("acme", 0, 10)
		time.Sleep(11 * time.Second)
		if got := spent(); got != 10 {
			t.Errorf("after 11 s %d bytes are on disk, want 10", got)
		}
		puts := dsk.puts
		time.Sleep(time.Minute)
		if dsk.puts != puts {
			t.Errorf("%d writes while nothing was spent", dsk.puts-puts)
		}
		kern.spend("acme", 1, 100)
		time.Sleep(time.Until(End(netpol.PerHour, Start(netpol.PerHour, time.Now()))) + time.Second)
		if !kern.spend("acme", 1, 100) {
			t.Error("an hour did not begin within a second")
		}
		kern.spend("acme", 0, 5)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got := spent(); got != 15 {
			t.Errorf("at the end %d bytes are on disk, want 15", got)
		}
		mu.Lock()
		defer mu.Unlock()
		if warning != "" {
			t.Errorf("warning %q", warning)
		}
	})
}
