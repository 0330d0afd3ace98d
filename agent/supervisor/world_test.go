// SPDX-License-Identifier: Apache-2.0

package supervisor_test

import (
	"context"
	"math/bits"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/spool"
	"github.com/bulkheadhq/bulkhead/agent/store"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/agent/supervisor/supervisortest"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// world is a machine, what is on its disk, and at most one agent at a time.
type world struct {
	t    testing.TB
	dir  string
	m    *supervisortest.Machine
	edit func(*supervisor.Config) // of every agent; optional

	tenants    *tenant.Set
	spoolLimit int64

	st     *store.Store
	sp     *spool.Spool
	proc   *supervisortest.Process
	sup    *supervisor.Supervisor
	cancel context.CancelFunc
	done   chan error // one value, from Run
}

// inWorld runs a test in a bubble of its own, where time passes only while
// everybody waits.
func inWorld(t *testing.T, test func(t *testing.T, w *world)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, dir: dir, m: supervisortest.NewMachine(), tenants: tenants(t, "acme-v1")}
		defer w.close()
		test(t, w)
	})
}

// inRealWorld is inWorld without a bubble, for tests in which somebody waits
// for a lock while time has to pass. Everything the agent does often it does
// every few milliseconds.
func inRealWorld[T testing.TB](t T, test func(t T, w *world)) {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), m: supervisortest.NewMachine(), tenants: tenants(t, "acme-v1")}
	w.edit = func(c *supervisor.Config) {
		c.Interval, c.VerifyEvery = time.Millisecond, 5*time.Millisecond
	}
	defer w.close()
	test(t, w)
}

// start lets an agent run; fault is its Config.Fault.
func (w *world) start(fault func(point string) error) {
	w.t.Helper()
	var err error
	if w.st, err = store.Open(filepath.Join(w.dir, "bulkhead.db")); err != nil {
		w.t.Fatal(err)
	}
	if w.sp, err = spool.Open(spool.Config{Dir: filepath.Join(w.dir, "spool"), NodeID: supervisortest.NodeID, LimitBytes: w.spoolLimit}); err != nil {
		w.t.Fatal(err)
	}
	w.proc = w.m.Process(w.st)
	cfg := w.proc.Config(w.dir, w.tenants, w.sp)
	cfg.Fault = fault
	cfg.SpoolFull = func() string {
		if w.sp.Status().Full {
			return "the spool is full"
		}
		return ""
	}
	if w.edit != nil {
		w.edit(&cfg)
	}
	if w.sup, err = supervisor.New(cfg); err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	w.done = make(chan error, 1)
	ready := make(chan struct{})
	go func() { w.done <- w.sup.Run(ctx, ready) }()
	<-ready
}

// killed waits until an agent whose fault has called die is gone.
func (w *world) killed() {
	w.t.Helper()
	if err := <-w.done; err != nil {
		w.t.Errorf("run: %v", err)
	}
	w.drop()
}

// die is kill -9, from inside a fault.
func (w *world) die() error {
	w.proc.Kill()
	w.cancel()
	return supervisortest.ErrKilled
}

// leave asks the agent to end, as systemd does.
func (w *world) leave() {
	w.t.Helper()
	w.cancel()
	w.killed()
}

func (w *world) drop() {
	if err := w.sp.Close(); err != nil {
		w.t.Error(err)
	}
	if err := w.st.Close(); err != nil {
		w.t.Error(err)
	}
	w.sup = nil
}

func (w *world) restart() {
	w.t.Helper()
	w.leave()
	w.start(nil)
}

func (w *world) close() {
	if w.sup != nil {
		w.cancel()
		<-w.done
		w.drop()
	}
	w.m.SetFault(nil)
	w.m.Reboot() // ends what still runs
	w.m.Settle()
	for _, v := range w.m.Violations() {
		w.t.Errorf("broken rule: %s", v)
	}
}

func spec(name, command string) sandbox.Spec {
	return sandbox.Spec{Name: name, Tenant: "acme", Image: supervisortest.Image, Command: []string{"sh", "-c", command}}
}

// create admits a sandbox or fails the test.
func (w *world) create(s sandbox.Spec) sandbox.Record {
	w.t.Helper()
	rec, err := w.sup.Create(w.t.Context(), s, "uid:7")
	if err != nil {
		w.t.Fatalf("create %s: %v", s.Name, err)
	}
	return rec
}

// run admits a sandbox and waits until its command runs.
func (w *world) run(s sandbox.Spec) sandbox.Record {
	w.t.Helper()
	rec := w.create(s)
	rec, err := w.sup.Launched(w.t.Context(), rec.ID)
	if err != nil {
		w.t.Fatal(err)
	}
	if rec.State != sandbox.Running {
		w.t.Fatalf("%s is %s: %+v", s.Name, rec.State, rec.Exit)
	}
	return rec
}

// wait waits until a sandbox is Stopped.
func (w *world) wait(id string) sandbox.Record {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 24*time.Hour)
	defer cancel()
	rec, err := w.sup.Wait(ctx, id)
	if err != nil {
		w.t.Fatalf("wait for %s: %v; warnings %q", id, err, w.sup.Warnings())
	}
	return rec
}

func (w *world) stop(id string, grace time.Duration) {
	w.t.Helper()
	if err := w.sup.Stop(id, sandbox.StopRequest{Reason: sandbox.StoppedBy, By: "uid:7", Grace: grace}); err != nil {
		w.t.Fatal(err)
	}
}

// record of a sandbox as the agent has it.
func (w *world) record(id string) sandbox.Record {
	w.t.Helper()
	for _, rec := range w.sup.List() {
		if rec.ID == id {
			return rec
		}
	}
	w.t.Fatalf("no record of %s", id)
	return sandbox.Record{}
}

func kinds(rec sandbox.Record) string {
	var out []string
	for _, e := range rec.Events {
		out = append(out, e.Kind)
	}
	return strings.Join(out, " ")
}

// checkGone asserts what holds once every sandbox is Stopped: nothing on the
// machine, slot 1 free, usage equal to the machine's own account.
func (w *world) checkGone() {
	w.t.Helper()
	time.Sleep(3 * time.Second) // the next sample takes warnings away
	if left := w.m.Leftovers(); len(left) > 0 {
		w.t.Errorf("left on the machine: %q", left)
	}
	if warns := w.sup.Warnings(); len(warns) > 0 {
		w.t.Errorf("warnings: %q", warns)
	}
	totals := w.ledger()
	for _, rec := range w.sup.List() {
		if rec.State != sandbox.Stopped {
			w.t.Errorf("%s is %s", rec.Spec.Name, rec.State)
		}
		w.checkUsage(rec, totals[rec.ID])
	}
	again := w.create(spec("again-"+sandbox.NewID(), "exit 0"))
	if again.Slot != 1 {
		w.t.Errorf("a new sandbox got slot %d, want 1: some slot was not given back", again.Slot)
	}
	w.wait(again.ID)
}

// checkUsage holds what was recorded against what the machine knows.
func (w *world) checkUsage(rec sandbox.Record, got map[string]uint64) {
	w.t.Helper()
	if rec.Final != nil && rec.Final.BootID != rec.BootID {
		return // rebooted: TestLostInAReboot says what then
	}
	truth := w.m.Account(rec.ID)
	want := map[string]uint64{}
	if !rec.Started.IsZero() {
		lived := rec.Final.Boot - rec.StartedBoot
		want = map[string]uint64{
			usagev1.MeterCPU:         truth.CPUNs,
			usagev1.MeterEgress:      truth.EgressBytes,
			usagev1.MeterIngress:     truth.IngressBytes,
			usagev1.MeterWall:        uint64(lived.Milliseconds()),
			usagev1.MeterMemReserved: mibMs(uint64(rec.Spec.Limits.MemoryBytes), lived),
			usagev1.MeterMemUsed:     mibMs(10<<20, lived),
		}
	} else if truth != (supervisortest.Account{}) {
		w.t.Errorf("%s used %+v and was never started", rec.Spec.Name, truth)
	}
	for _, m := range usagev1.Meters() {
		if got[m] != want[m] {
			w.t.Errorf("%s of %s: recorded %d, want %d", m, rec.Spec.Name, got[m], want[m])
		}
	}
}

func mibMs(bytes uint64, d time.Duration) uint64 {
	hi, lo := bits.Mul64(bytes, uint64(d))
	quotient, _ := bits.Div64(hi, lo, 1<<20*uint64(time.Millisecond))
	return quotient
}

// ledger adds up the spool as a gateway would, and asserts that nothing is in
// it twice, missing or out of order.
func (w *world) ledger() map[string]map[string]uint64 {
	w.t.Helper()
	type state struct {
		seq, total uint64
		end        int64
	}
	meters := map[string]state{}
	totals := map[string]map[string]uint64{}
	for from := uint64(1); ; {
		recs, err := w.sp.Read(from, 500)
		if err != nil {
			w.t.Fatal(err)
		}
		if len(recs) == 0 {
			return totals
		}
		for _, r := range recs {
			id, err := usagev1.ParseID(r.Id)
			if err != nil {
				w.t.Fatal(err)
			}
			key := r.Sandbox + "/" + r.Meter
			st := meters[key]
			st.seq++
			st.total += r.Delta
			if id.Seq != st.seq || r.Cumulative != st.total || st.end != 0 && r.StartNs != st.end || r.EndNs < r.StartNs {
				w.t.Errorf("record %s follows sequence %d, total %d, end %d: %v", r.Id, st.seq-1, st.total-r.Delta, st.end, r)
			}
			st.end = r.EndNs
			meters[key] = st
			if totals[r.Sandbox] == nil {
				totals[r.Sandbox] = map[string]uint64{}
			}
			totals[r.Sandbox][r.Meter] += r.Delta
			from = r.NodeSeq + 1
		}
	}
}

// tenants loads a directory of testdata.
func tenants(t testing.TB, name string) *tenant.Set {
	t.Helper()
	set, err := tenant.Load(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return set
}
