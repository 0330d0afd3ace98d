// SPDX-License-Identifier: Apache-2.0

package supervisor_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/admit"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// writes are the operations that need room on the disk.
func writes(op string) bool {
	switch op {
	case "store.Reserve", "store.Put", "store.Release", "store.Delete", "store.PutMarks", "spool.Append", "spool.Forget":
		return true
	}
	return false
}

// TestDiskFull fills the disk at the nth write of a life and gives the room
// back ten seconds later: the sandbox runs with a record or not at all, and
// whatever happened is whole in the end.
func TestDiskFull(t *testing.T) {
	for nth := 1; ; nth++ {
		var reached atomic.Bool
		t.Run(fmt.Sprint(nth), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.m.SetBusy(busy)
				var seen atomic.Int64
				var room atomic.Bool
				w.m.SetFault(func(op, _ string) error {
					if !writes(op) || room.Load() || seen.Add(1) < int64(nth) {
						return nil
					}
					reached.Store(true)
					return errors.New("no space left on device")
				})
				w.start(nil)
				rec, err := w.sup.Create(t.Context(), life(), "uid:7")
				if err == nil {
					// Nobody waits for the room before being told.
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					_, lerr := w.sup.Launched(ctx, rec.ID)
					cancel()
					if lerr != nil && !strings.Contains(lerr.Error(), "no space left") {
						t.Errorf("launched: %v", lerr)
					}
				}
				time.Sleep(10 * time.Second)
				room.Store(true)
				if err != nil {
					if !strings.Contains(err.Error(), "no space left") || len(w.sup.List()) != 0 {
						t.Errorf("refused with %v, records %+v", err, w.sup.List())
					}
					w.checkGone()
					return
				}
				rec = w.wait(rec.ID)
				want, text := sandbox.Exited, "code 3"
				if !w.m.Ran(rec.ID) {
					want, text = sandbox.LaunchFailed, "no space left"
				}
				if rec.Exit.Reason != want || !strings.Contains(rec.Exit.Message, text) {
					t.Errorf("got %+v, want %s with %q", *rec.Exit, want, text)
				}
				w.checkGone()
				w.restart()
				w.checkGone()
			})
		})
		if !reached.Load() {
			if nth < 8 {
				t.Errorf("a life has only %d writes", nth-1)
			}
			return
		}
	}
}

// TestStopWithAFullDisk: a request that cannot be written stops all the same.
func TestStopWithAFullDisk(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 1000"))
		var full atomic.Bool
		full.Store(true)
		w.m.SetFault(func(op, _ string) error {
			if writes(op) && full.Load() {
				return errInjected
			}
			return nil
		})
		if err := w.sup.Stop(a.ID, sandbox.StopRequest{Reason: sandbox.StoppedBy, By: "uid:7", Grace: -1}); err == nil {
			t.Error("the caller is not told that the request is not on disk")
		}
		time.Sleep(5 * time.Second)
		if w.m.Running(a.ID) {
			t.Error("it still runs")
		}
		if warns := strings.Join(w.sup.Warnings(), "\n"); !strings.Contains(warns, "cannot be torn down, still trying") {
			t.Errorf("warnings: %s", warns)
		}
		full.Store(false)
		w.wait(a.ID)
		w.checkGone()
	})
}

// TestSpoolFull: nothing starts that could not be metered, what runs goes on,
// and what it used is recorded once there is room.
func TestSpoolFull(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.m.SetBusy(busy)
		w.spoolLimit = 32 << 10
		w.start(nil)
		a, b := w.run(spec("a", "sleep 400; exit 3")), w.run(spec("b", "sleep 60; exit 4"))
		for range 600 {
			if w.sp.Status().Full {
				break
			}
			time.Sleep(time.Second)
		}
		_, err := w.sup.Create(t.Context(), spec("c", "exit 0"), "uid:7")
		var d *admit.Denied
		if !errors.As(err, &d) || d.Reason != admit.UsageSpool || !strings.Contains(d.Error(), "the spool is full") {
			t.Fatalf("create with a full spool: got %v", err)
		}
		time.Sleep(70 * time.Second)
		if rec := w.record(a.ID); rec.State != sandbox.Running || !w.m.Send(a.ID, 1) {
			t.Errorf("a running sandbox is %s because the spool is full", rec.State)
		}
		if rec := w.record(b.ID); rec.State != sandbox.Stopping || rec.Exit.Code != 4 || len(w.m.Leftovers()) != 6 {
			t.Errorf("a sandbox that ended is %s, %+v, %q on the machine; want stopping until its usage is in the spool, and only the other's things",
				rec.State, rec.Exit, w.m.Leftovers())
		}
		if warns := strings.Join(w.sup.Warnings(), "\n"); !strings.Contains(warns, "usage") {
			t.Errorf("warnings: %s", warns)
		}
		w.restart() // that changes nothing
		sum := map[string]map[string]uint64{}
		for range 1000 { // a gateway takes it all, again and again
			w.takeAll(sum)
			if !w.record(a.ID).State.Live() && !w.record(b.ID).State.Live() {
				break
			}
			time.Sleep(time.Second)
		}
		w.takeAll(sum)
		for _, id := range []string{a.ID, b.ID} {
			w.checkUsage(w.wait(id), sum[id])
		}
		if left := w.m.Leftovers(); len(left) > 0 {
			t.Errorf("left on the machine: %q", left)
		}
		if rec := w.wait(w.create(spec("c", "exit 0")).ID); rec.Exit.Code != 0 {
			t.Errorf("after there was room: %+v", rec.Exit)
		}
	})
}

// takeAll is a gateway: it adds up what is in the spool and acknowledges it.
func (w *world) takeAll(sum map[string]map[string]uint64) {
	w.t.Helper()
	st := w.sp.Status()
	if st.Last == st.Acked {
		return
	}
	recs, err := w.sp.Read(st.Acked+1, 10000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range recs {
		if sum[r.Sandbox] == nil {
			sum[r.Sandbox] = map[string]uint64{}
		}
		sum[r.Sandbox][r.Meter] += r.Delta
	}
	if err := w.sp.Ack(recs[len(recs)-1].NodeSeq); err != nil {
		w.t.Fatal(err)
	}
}

// TestTheLastSampleIsTheLast: samples of the meter's loop that are taken while
// a sandbox ends are not after the final one, and count nothing twice.
func TestTheLastSampleIsTheLast(t *testing.T) {
	inRealWorld(t, func(t *testing.T, w *world) {
		w.m.SetBusy(3 * time.Millisecond)
		w.m.SetFault(func(op, _ string) error {
			if op == "cgroups.Usage" { // the round of the meter takes longer than a life
				time.Sleep(5 * time.Millisecond)
			}
			return nil
		})
		w.start(nil)
		for round := range 2 {
			var ids []string
			for i := range 10 {
				// The last to be sampled is the first to end.
				command := fmt.Sprintf("sleep %g", 0.6-0.05*float64(i))
				ids = append(ids, w.create(spec(fmt.Sprintf("s%d-%d", round, i), command)).ID)
			}
			for _, id := range ids {
				w.wait(id)
			}
		}
		w.checkGone()
	})
}

// TestMidnight: records never cross it.
func TestMidnight(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) { // a bubble begins at midnight
		w.m.SetBusy(73 * time.Second)
		w.edit = func(c *supervisor.Config) { c.Interval, c.VerifyEvery = 7*time.Minute, time.Hour }
		w.start(nil)
		time.Sleep(23 * time.Hour)
		a := w.run(spec("a", "sleep 7200"))
		w.wait(a.ID)
		w.checkGone()
		recs, err := w.sp.Read(1, 100000)
		if err != nil {
			t.Fatal(err)
		}
		days := map[int]uint64{}
		for _, r := range recs {
			start, end := time.Unix(0, r.StartNs).UTC(), time.Unix(0, r.EndNs-1).UTC()
			if r.EndNs > r.StartNs && start.YearDay() != end.YearDay() {
				t.Errorf("%s runs from %s to %s", r.Id, start, end)
			}
			if r.Meter == usagev1.MeterWall && r.Sandbox == a.ID {
				days[start.YearDay()] += r.Delta
			}
		}
		for day, ms := range days {
			if ms != 3600_000 {
				t.Errorf("day %d: %d ms, want an hour", day, ms)
			}
		}
	})
}
