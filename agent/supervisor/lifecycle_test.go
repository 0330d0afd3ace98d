// SPDX-License-Identifier: Apache-2.0

package supervisor_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/admit"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/store"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/agent/supervisor/supervisortest"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/tenant"
)

func TestHowASandboxEnds(t *testing.T) {
	const forever, polite = "sleep 1000", "trap 'exit 5' TERM; sleep 1000"
	for _, c := range []struct {
		name, command string
		ttl           time.Duration
		while         func(w *world, id string)
		reason        sandbox.ExitReason
		code          int
		message, by   string
		lived         time.Duration
	}{
		{name: "own code", command: "sleep 1; exit 3", reason: sandbox.Exited, code: 3, message: "exited with code 3", lived: time.Second},
		{name: "at once", command: "exit 0", reason: sandbox.Exited, message: "exited with code 0"},
		{name: "signal of a stranger", command: "sleep 0.5; exit 139", reason: sandbox.Signaled, code: 139, message: "signal 11", lived: 500 * time.Millisecond},
		{name: "stop with a handler", command: polite, while: func(w *world, id string) { w.stop(id, 0) },
			reason: sandbox.StoppedBy, code: 5, message: "stopped by uid:7", by: "uid:7"},
		{name: "stop without a handler", command: forever, while: func(w *world, id string) { w.stop(id, 3*time.Second) },
			reason: sandbox.StoppedBy, code: 137, message: "stopped by uid:7", by: "uid:7", lived: 3 * time.Second},
		{name: "stop after the node's grace", command: forever, while: func(w *world, id string) { w.stop(id, 0) },
			reason: sandbox.StoppedBy, code: 137, message: "stopped by uid:7", by: "uid:7", lived: 2 * time.Second},
		{name: "kill", command: polite, while: func(w *world, id string) { w.stop(id, -1) },
			reason: sandbox.StoppedBy, code: 137, message: "stopped by uid:7", by: "uid:7"},
		{name: "a second stop is impatient", command: forever, while: func(w *world, id string) {
			w.stop(id, time.Minute)
			time.Sleep(4 * time.Second)
			w.stop(id, -1)
		}, reason: sandbox.StoppedBy, code: 137, message: "stopped by uid:7", by: "uid:7", lived: 4 * time.Second},
		{name: "a second stop is more patient", command: forever, while: func(w *world, id string) {
			w.stop(id, 2*time.Second)
			time.Sleep(time.Second)
			w.stop(id, time.Hour)
		}, reason: sandbox.StoppedBy, code: 137, message: "stopped by uid:7", by: "uid:7", lived: 2 * time.Second},
		{name: "lifetime", command: forever, ttl: 7 * time.Second, reason: sandbox.TTL, code: 137, message: "lifetime of 7s is over", lived: 9 * time.Second},
		{name: "lifetime with a handler", command: polite, ttl: 7 * time.Second, reason: sandbox.TTL, code: 5, message: "lifetime of 7s is over", lived: 7 * time.Second},
		{name: "out of memory, the runtime says", command: "sleep 1; oom", reason: sandbox.OOM, code: 137, message: "67108864", lived: time.Second},
		{name: "out of memory, the kernel says", command: "sleep 1; exit 137", while: func(w *world, id string) { w.m.OOM(id) },
			reason: sandbox.OOM, code: 137, message: "67108864", lived: time.Second},
		{name: "a child was out of memory", command: "sleep 1; exit 0", while: func(w *world, id string) { w.m.OOM(id) },
			reason: sandbox.Exited, code: 0, message: "code 0", lived: time.Second},
	} {
		for _, restarted := range []bool{false, true} {
			name := c.name
			if restarted {
				name += ", agent restarted"
			}
			t.Run(name, func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *world) {
					w.m.SetBusy(busy)
					w.start(nil)
					s := spec("a", c.command)
					s.TTL = c.ttl
					rec := w.create(s)
					rec, err := w.sup.Launched(t.Context(), rec.ID)
					if err != nil {
						t.Fatal(err)
					}
					if c.while != nil {
						c.while(w, rec.ID)
					}
					if restarted {
						w.restart()
					}
					rec = w.wait(rec.ID)
					x := rec.Exit
					if x.Reason != c.reason || x.Code != c.code || !strings.Contains(x.Message, c.message) || x.By != c.by {
						t.Errorf("got %+v, want %s, code %d, by %q, with %q", *x, c.reason, c.code, c.by, c.message)
					}
					if lived := rec.Final.Boot - rec.StartedBoot; lived != c.lived {
						t.Errorf("it lived %s, want %s", lived, c.lived)
					}
					w.checkGone()
				})
			})
		}
	}
}

func TestStopOfAStoppedSandboxIsNoError(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		rec := w.wait(w.create(spec("a", "exit 4")).ID)
		w.stop(rec.ID, 0)
		if got := w.record(rec.ID); got.Exit.Reason != sandbox.Exited || got.Exit.Code != 4 || got.Stop != nil {
			t.Errorf("a stop changed the record of a stopped sandbox: %+v", got)
		}
		if err := w.sup.Stop("nosuchsandbx", sandbox.StopRequest{}); !errors.Is(err, supervisor.ErrNotFound) {
			t.Errorf("stop of what is not there: got %v, want ErrNotFound", err)
		}
	})
}

// TestStopDuringTheLaunch: whatever the launch is doing, the command is
// stopped or never runs, and the record says that it was asked for.
func TestStopDuringTheLaunch(t *testing.T) {
	for _, point := range []string{"place", "link:do", "task:do", "task:done", "start:do", "start:recorded", "start:done"} {
		t.Run(point, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				ids := make(chan string, 1)
				f := faults{point: point, nth: 1}
				f.do = func() error { w.stop(<-ids, 0); return nil }
				w.start(f.fault)
				id := w.create(spec("a", "sleep 1000")).ID
				ids <- id
				rec := w.wait(id)
				if !strings.Contains(rec.Exit.Message, "uid:7") || rec.Stop == nil {
					t.Errorf("got %+v", *rec.Exit)
				}
				w.checkGone()
			})
		})
	}
}

func TestDeleteAndNames(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "echo hello; sleep 5"))
		_, err := w.sup.Create(t.Context(), spec("a", "exit 0"), "uid:7")
		var taken *store.NameTakenError
		if !errors.As(err, &taken) || taken.ID != a.ID {
			t.Errorf("second sandbox of one name: got %v, want a NameTakenError of %s", err, a.ID)
		}
		if err := w.sup.Delete(a.ID); !errors.Is(err, supervisor.ErrNotStopped) {
			t.Errorf("delete of a running sandbox: got %v, want ErrNotStopped", err)
		}
		w.wait(a.ID)
		if _, err := w.sup.Create(t.Context(), spec("a", "exit 0"), "uid:7"); !errors.As(err, &taken) {
			t.Errorf("a stopped sandbox keeps its name: got %v", err)
		}
		log := filepath.Join(w.dir, "logs", a.ID)
		if _, err := os.Stat(log); err != nil {
			t.Errorf("log of a stopped sandbox: %v", err)
		}
		if err := w.sup.Delete(a.ID); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(log); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("log of a deleted sandbox: %v", err)
		}
		if err := w.sup.Delete(a.ID); !errors.Is(err, supervisor.ErrNotFound) {
			t.Errorf("second delete: got %v, want ErrNotFound", err)
		}
		w.wait(w.create(spec("a", "exit 0")).ID)
		w.checkGone()
		w.restart()
		if n := len(w.sup.List()); n != 2 {
			t.Errorf("%d records after a restart, want 2", n)
		}
	})
}

// TestDeleteBetweenStoppedAndReleased: a client that watches may delete a
// sandbox the moment it says Stopped, before its slot is given back.
func TestDeleteBetweenStoppedAndReleased(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		f := faults{point: "release", nth: 1}
		f.do = func() error { return w.sup.Delete(w.sup.List()[0].ID) }
		w.start(f.fault)
		w.create(spec("a", "sleep 1"))
		time.Sleep(10 * time.Second)
		if f.count() != 1 {
			t.Fatalf("the point was reached %d times", f.count())
		}
		if recs := w.sup.List(); len(recs) != 0 {
			t.Errorf("records: %+v", recs)
		}
		w.checkGone()
	})
}

func TestAutoRemove(t *testing.T) {
	s := spec("a", "sleep 1")
	s.AutoRemove = true
	t.Run("waits for readers", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.start(nil)
			id := w.create(s).ID
			release, err := w.sup.Hold(id)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Second)
			if got := w.record(id).State; got != sandbox.Stopped {
				t.Errorf("held sandbox is %s", got)
			}
			release()
			time.Sleep(2 * time.Second)
			if n := len(w.sup.List()); n != 0 {
				t.Errorf("%d records after the last reader has gone", n)
			}
			w.checkGone()
		})
	})
	t.Run("is not forgotten by a restart", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.start(nil)
			id := w.create(s).ID
			release, err := w.sup.Hold(id)
			if err != nil {
				t.Fatal(err)
			}
			w.wait(id)
			w.restart()
			release()
			time.Sleep(5 * time.Second)
			if n := len(w.sup.List()); n != 0 {
				t.Errorf("%d records of stopped sandboxes that were to be removed", n)
			}
		})
	})
}

func TestRefusals(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		for _, c := range []struct {
			name string
			edit func(*sandbox.Spec)
			is   func(error) bool
		}{
			{"image", func(s *sandbox.Spec) { s.Image = "nosuch" }, func(err error) bool { return errors.Is(err, runtime.ErrImageNotFound) }},
			{"tenant", func(s *sandbox.Spec) { s.Tenant = "initech" }, func(err error) bool {
				var d *admit.Denied
				return errors.As(err, &d) && d.Reason == admit.TenantUnknown
			}},
			{"limit", func(s *sandbox.Spec) { s.Limits.CPUMillis = -1 }, isSpecError},
			{"runtime", func(s *sandbox.Spec) { s.RuntimeClass = "gvisor" }, isSpecError},
			{"policy", func(s *sandbox.Spec) { s.Policy = "kind: EgressPolicy\nname: x\nrulez: []\n" }, func(err error) bool {
				return strings.Contains(err.Error(), "rulez")
			}},
		} {
			s := spec("a", "exit 0")
			c.edit(&s)
			_, err := w.sup.Create(t.Context(), s, "uid:7")
			if err == nil || !c.is(err) {
				t.Errorf("%s: got %v", c.name, err)
			}
		}
		if recs := w.sup.List(); len(recs) != 0 {
			t.Errorf("refusals left records: %+v", recs)
		}
		w.checkGone()
	})
}

func isSpecError(err error) bool {
	var e *sandbox.SpecError
	return errors.As(err, &e)
}

// TestCreateManyAtOnce: of 100 creates at the same moment a quota of 10 admits
// exactly 10.
func TestCreateManyAtOnce(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		errs := make(chan error, 100)
		for i := range 100 {
			go func() {
				_, err := w.sup.Create(t.Context(), spec(fmt.Sprintf("s%d", i), "sleep 30"), "uid:7")
				errs <- err
			}()
		}
		admitted := 0
		for range 100 {
			err := <-errs
			var d *admit.Denied
			switch {
			case err == nil:
				admitted++
			case !errors.As(err, &d) || d.Reason != admit.Quota || d.Resource != admit.Sandboxes || d.Limit != 10 || d.InUse != 10 || d.SetBy != "acme":
				t.Errorf("refused with %v (%+v)", err, d)
			}
		}
		if admitted != 10 {
			t.Errorf("%d were admitted, want 10", admitted)
		}
		slots := map[uint32]bool{}
		for _, rec := range w.sup.List() {
			rec = w.wait(rec.ID)
			slots[rec.Slot] = true
		}
		if len(slots) != 10 {
			t.Errorf("10 sandboxes had %d slots", len(slots))
		}
		w.checkGone()
	})
}

// TestLostInAReboot: nothing of the sandbox is left, its usage ends where its
// last record does and says that it was reconstructed.
func TestLostInAReboot(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.m.SetBusy(busy)
		w.start(nil)
		id := w.run(spec("a", "sleep 1000")).ID
		time.Sleep(3500 * time.Millisecond)
		w.leave()
		w.m.Reboot()
		w.edit = func(c *supervisor.Config) {
			c.BootID, c.Source = "boot-2", "node/"+supervisortest.NodeID+"/boot/boot-2"
		}
		w.start(nil)
		rec := w.wait(id)
		if rec.Exit.Reason != sandbox.LostExit || !strings.Contains(rec.Exit.Message, "rebooted") {
			t.Errorf("got %+v, want lost", *rec.Exit)
		}
		totals := w.ledger()[id]
		if got := totals[usagev1.MeterWall]; got < 3000 || got > 3500 {
			t.Errorf("wall_ms is %d, want what was recorded before the reboot", got)
		}
		recs, err := w.sp.Read(1, 1000)
		if err != nil {
			t.Fatal(err)
		}
		closed := 0
		for _, r := range recs {
			if r.Quality == usagev1.Quality_QUALITY_RECONSTRUCTED {
				closed++
				if r.Delta != 0 || !strings.HasSuffix(r.Source, "boot-1") && !strings.HasSuffix(r.Source, "boot-2") {
					t.Errorf("reconstructed record: %v", r)
				}
			}
		}
		if closed != len(usagev1.Meters()) {
			t.Errorf("%d meters were closed as reconstructed, want all %d", closed, len(usagev1.Meters()))
		}
		w.checkGone()
	})
}

// TestLostByTheRuntime: the shim and all it had was killed.
func TestLostByTheRuntime(t *testing.T) {
	for _, away := range []bool{false, true} {
		t.Run(fmt.Sprintf("agent away %t", away), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.m.SetBusy(busy)
				w.start(nil)
				id := w.run(spec("a", "sleep 1000")).ID
				time.Sleep(1500 * time.Millisecond)
				if away {
					w.leave()
					w.m.Node.Lose(id)
					w.start(nil)
				} else {
					w.m.Node.Lose(id)
				}
				rec := w.wait(id)
				if !away && rec.Exit.Code == 137 { // the fake says first how it ended
					return
				}
				if rec.Exit.Reason != sandbox.LostExit {
					t.Errorf("got %+v, want lost", *rec.Exit)
				}
				w.checkGone()
			})
		})
	}
}

func TestFind(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("same", "sleep 5"))
		other := spec("same", "sleep 5")
		other.Tenant = "globex"
		b := w.run(other)
		all := func(tenant.Path) bool { return true }
		for _, c := range []struct {
			ref  string
			may  func(tenant.Path) bool
			want string
			err  error
		}{
			{a.ID, all, a.ID, nil},
			{a.ID[:6], all, a.ID, nil},
			{a.ID[:3], all, "", supervisor.ErrNotFound},
			{"acme:same", all, a.ID, nil},
			{"globex:same", all, b.ID, nil},
			{"same", all, "", supervisor.ErrAmbiguous},
			{"same", func(p tenant.Path) bool { return p == "globex" }, b.ID, nil},
			{a.ID, func(p tenant.Path) bool { return p == "globex" }, "", supervisor.ErrNotFound},
			{"", all, "", supervisor.ErrNotFound},
			{"nosuch", all, "", supervisor.ErrNotFound},
		} {
			rec, err := w.sup.Find(c.ref, c.may)
			if rec.ID != c.want || !errors.Is(err, c.err) {
				t.Errorf("find %q: got %s, %v; want %s, %v", c.ref, rec.ID, err, c.want, c.err)
			}
		}
	})
}

// TestUnknownThingsAreLeftAlone: what no record knows is named, not removed.
func TestUnknownThingsAreLeftAlone(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		stranger := w.run(spec("a", "sleep 3600"))
		w.leave()
		if err := os.Rename(filepath.Join(w.dir, "bulkhead.db"), filepath.Join(w.dir, "other.db")); err != nil {
			t.Fatal(err)
		}
		w.start(nil)
		time.Sleep(10 * time.Second)
		warns := strings.Join(w.sup.Warnings(), "\n")
		for _, what := range []string{stranger.ID, "cgroup", "container", "egress program", "link", "left alone"} {
			if !strings.Contains(warns, what) {
				t.Errorf("warnings do not name %q: %s", what, warns)
			}
		}
		// Nor are they in anybody's way.
		rec := w.wait(w.run(spec("a", "sleep 1; exit 3")).ID)
		if rec.Slot != 2 || rec.Exit.Code != 3 {
			t.Errorf("beside a stranger in slot 1 a sandbox gets slot %d and ends with %+v", rec.Slot, *rec.Exit)
		}
		if left := w.m.Leftovers(); len(left) != 6 || !w.m.LinkUp(stranger.ID) || !w.m.Running(stranger.ID) {
			t.Errorf("a stranger's things: %q, want all 6 of them", left)
		}
	})
}
