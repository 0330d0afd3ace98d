// SPDX-License-Identifier: Apache-2.0

package supervisor_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/runtime"
)

// Flows of the two rules of testdata/acme-v1; acme-v2 has no bulk any more.
var (
	api  = netpol.Flow{Proto: netpol.TCP, Dst: netip.MustParseAddr("203.0.113.10"), Port: 80}
	bulk = netpol.Flow{Proto: netpol.TCP, Dst: netip.MustParseAddr("203.0.113.20"), Port: 5001}
)

// checkBulk asserts what the machine does with a bulk packet, and that the
// agent says the same.
func (w *world) checkBulk(rec sandbox.Record, want bool) {
	w.t.Helper()
	if !w.m.SendTo(rec.ID, api, 1) {
		w.t.Errorf("%s does not reach what both policies allow", rec.Spec.Name)
	}
	if got := w.m.SendTo(rec.ID, bulk, 1); got != want {
		w.t.Errorf("%s: bulk allowed %t, want %t", rec.Spec.Name, got, want)
	}
	prog, err := w.sup.Program(rec.ID)
	if err != nil || prog.Evaluate(bulk).Allowed != want {
		w.t.Errorf("%s: the agent says %t, want %t (%v)", rec.Spec.Name, prog.Evaluate(bulk).Allowed, want, err)
	}
	now := w.record(rec.ID)
	if now.PolicyDigest != prog.Digest {
		w.t.Errorf("%s: the record names another policy than the one in force", rec.Spec.Name)
	}
	if rev := w.m.PolicyRev(rec.ID); rev != now.PolicyRev {
		w.t.Errorf("%s: revision %d is in force, the record says %d", rec.Spec.Name, rev, now.PolicyRev)
	}
}

func TestReload(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a, b := w.run(spec("a", "sleep 1000")), w.run(spec("b", "sleep 1000"))
		w.checkBulk(a, true)
		updated, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2"))
		if err != nil || updated != 2 {
			t.Fatalf("reload: %d updated, %v", updated, err)
		}
		w.checkBulk(a, false)
		w.checkBulk(b, false)
		if q, _ := w.m.Quota("acme"); q.CPUMillis != 4000 {
			t.Errorf("cgroup of acme: %+v, want 4 CPUs", q)
		}
		if got := w.record(a.ID).PolicyRev; got != 2 {
			t.Errorf("policy revision %d, want 2", got)
		}
		if updated, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2")); err != nil || updated != 0 {
			t.Errorf("reload of the same: %d updated, %v", updated, err)
		}
		c := w.run(spec("c", "sleep 1000"))
		w.checkBulk(c, false)
	})
}

// TestReloadIsAllOrNothing breaks a reload at every step that it takes.
func TestReloadIsAllOrNothing(t *testing.T) {
	for _, op := range []string{"egress.SetPolicy", "names.Swap", "budgets.Ensure", "store.PutAll", "cgroups.Ensure"} {
		for nth := 1; nth <= 3; nth++ {
			inWorld(t, func(t *testing.T, w *world) {
				w.start(nil)
				var recs []sandbox.Record
				for _, name := range []string{"a", "b", "c"} {
					recs = append(recs, w.run(spec(name, "sleep 1000")))
				}
				var left atomic.Int64
				left.Store(int64(nth))
				w.m.SetFault(func(o, _ string) error {
					if o == op && left.Add(-1) == 0 {
						return errInjected
					}
					return nil
				})
				updated, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2"))
				if left.Load() > 0 { // it takes fewer steps of this kind
					if err != nil || updated != 3 {
						t.Errorf("%s %d: not broken, %d updated, %v", op, nth, updated, err)
					}
					return
				}
				if err == nil || updated != 0 || !strings.Contains(err.Error(), "injected") {
					t.Errorf("%s %d: %d updated, %v; want a refusal", op, nth, updated, err)
				}
				for _, rec := range recs {
					w.checkBulk(rec, true)
				}
				if q, _ := w.m.Quota("acme"); q.CPUMillis != 8000 {
					t.Errorf("%s %d: cgroup of acme: %+v, want the old 8 CPUs", op, nth, q)
				}
				w.m.SetFault(nil)
				w.restart()
				time.Sleep(time.Second)
				for _, rec := range recs {
					w.checkBulk(rec, true)
				}
				if updated, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2")); err != nil || updated != 3 {
					t.Errorf("%s %d: second try: %d updated, %v", op, nth, updated, err)
				}
				for _, rec := range recs {
					w.checkBulk(rec, false)
				}
			})
		}
	}
}

// TestKilledDuringAReload: an agent dies when some sandboxes have the new policy
// and some the old. The next one gives all of them what the files say, whichever
// that is.
func TestKilledDuringAReload(t *testing.T) {
	for _, op := range []string{"store.PutAll", "budgets.Ensure", "names.Swap", "egress.SetPolicy"} {
		for _, files := range []string{"acme-v1", "acme-v2"} {
			for nth := 1; nth <= 3; nth++ {
				inWorld(t, func(t *testing.T, w *world) {
					w.start(nil)
					var recs []sandbox.Record
					for _, name := range []string{"a", "b", "c"} {
						recs = append(recs, w.run(spec(name, "sleep 1000")))
						w.resolve(recs[len(recs)-1])
					}
					var left atomic.Int64
					left.Store(int64(nth))
					w.m.SetFault(func(o, _ string) error {
						if o == op && left.Add(-1) == 0 {
							return w.die()
						}
						return nil
					})
					_, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2"))
					w.m.SetFault(nil)
					if left.Load() > 0 { // it takes fewer steps of this kind
						return
					}
					if err == nil {
						t.Errorf("%s %d: a dead agent has reloaded", op, nth)
					}
					w.killed()
					w.tenants = tenants(t, files)
					w.start(nil)
					time.Sleep(time.Second)
					for _, rec := range recs {
						w.checkBulk(rec, files == "acme-v1")
						w.checkLearned(rec, true)
						w.resolve(rec)
						if now := w.record(rec.ID); now.State != sandbox.Running || strings.Contains(kinds(now), "not_enforced") {
							t.Errorf("%s %d: %s is %s: %s", op, nth, rec.Spec.Name, now.State, kinds(now))
						}
					}
				})
			}
		}
	}
}

func TestReloadKeepsTenantsWithSandboxes(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 5"))
		if _, err := w.sup.Reload(t.Context(), tenants(t, "gone")); err == nil || !strings.Contains(err.Error(), "stop it first") {
			t.Errorf("reload without acme: got %v", err)
		}
		w.checkBulk(a, true)
		w.wait(a.ID)
		if _, err := w.sup.Reload(t.Context(), tenants(t, "gone")); err != nil {
			t.Errorf("reload without acme once its sandbox has stopped: %v", err)
		}
	})
}

// TestReloadDuringALaunch: wherever the launch is, the command meets the new
// policy and never the old one.
func TestReloadDuringALaunch(t *testing.T) {
	for _, point := range []string{"place", "cgroup:do", "link:done", "egress:do", "egress:done", "names:do", "names:done", "task:do", "task:done", "start:do", "start:recorded", "start:done"} {
		t.Run(point, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				f := faults{point: point, nth: 1}
				f.do = func() error {
					_, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2"))
					return err
				}
				w.start(f.fault)
				rec := w.run(spec("a", "sleep 5"))
				w.checkBulk(rec, false)
				if f.count() != 1 {
					t.Errorf("the point was reached %d times", f.count())
				}
			})
		})
	}
	t.Run("between the decision and the reservation", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.start(nil)
			w.m.SetFault(func(op, _ string) error {
				if op == "runtime.Image" {
					_, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2"))
					return err
				}
				return nil
			})
			w.checkBulk(w.run(spec("a", "sleep 5")), false)
		})
	})
}

// TestReloadWhileTheAgentIsAway: the next agent puts today's policy in force.
func TestReloadWhileTheAgentIsAway(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 1000"))
		w.leave()
		w.tenants = tenants(t, "acme-v2")
		w.start(nil)
		time.Sleep(time.Second)
		w.checkBulk(a, false)
		if rec := w.record(a.ID); rec.PolicyRev != 2 || rec.State != sandbox.Running {
			t.Errorf("%s, policy revision %d; want running, 2", rec.State, rec.PolicyRev)
		}
		w.leave()
		w.tenants = tenants(t, "gone")
		w.start(nil)
		rec := w.wait(a.ID)
		if !strings.Contains(rec.Exit.Message, "egress could not be enforced") {
			t.Errorf("its tenant has gone: got %+v", *rec.Exit)
		}
	})
}

func TestDriftIsRepaired(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 1000"))
		w.m.TakeOff(a.ID)
		time.Sleep(6 * time.Second)
		if !w.m.LinkUp(a.ID) || !w.m.SendTo(a.ID, api, 100) {
			t.Error("it is not repaired")
		}
		if k := kinds(w.record(a.ID)); !strings.HasSuffix(k, "drift repaired") {
			t.Errorf("events: %s", k)
		}
		w.stop(a.ID, -1)
		w.wait(a.ID)
		w.checkGone()
	})
}

// TestDriftThatStaysIsCutOff: what cannot be enforced again is stopped, its
// link down from the moment it was seen.
func TestDriftThatStaysIsCutOff(t *testing.T) {
	for _, op := range []string{"links.Create", "budgets.Ensure", "names.Swap", "names.Start", "egress.Attach", "egress.Verify", "links.Up", "links.Verify"} {
		t.Run(op, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.start(nil)
				a := w.run(spec("a", "trap 'exit 0' TERM; sleep 1000"))
				w.m.SetFault(func(o, _ string) error {
					if o == op && w.record(a.ID).State == sandbox.Running {
						if w.m.LinkUp(a.ID) && !strings.HasSuffix(o, ".Verify") {
							t.Errorf("%s with the link up", o)
						}
						return errInjected
					}
					return nil
				})
				w.m.TakeOff(a.ID)
				rec := w.wait(a.ID)
				if rec.Exit.Reason != sandbox.StoppedBy || rec.Exit.By != "bulkhead" || !strings.Contains(rec.Exit.Message, "egress could not be enforced") {
					t.Errorf("got %+v", *rec.Exit)
				}
				w.m.SetFault(nil)
				w.checkGone()
			})
		})
	}
}

// TestDriftAtTheEnd: a repair that begins when the command ends makes nothing
// anew that teardown has removed.
func TestDriftAtTheEnd(t *testing.T) {
	inRealWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		for i := range 5 {
			a := w.run(spec(fmt.Sprintf("s%d", i), "sleep 1000"))
			w.m.SetFault(func(op, _ string) error {
				if op == "links.Create" { // the repair is on its way; meanwhile all of it goes
					w.m.SetFault(nil)
					w.stop(a.ID, -1)
					time.Sleep(50 * time.Millisecond)
				}
				return nil
			})
			w.m.TakeOff(a.ID)
			w.wait(a.ID)
		}
		w.checkGone()
	})
}

// TestAdoptionAsksUntilItIsSure: a runtime that does not answer is asked
// again. Nothing is destroyed meanwhile, and nothing is said to run that never
// was let run.
func TestAdoptionAsksUntilItIsSure(t *testing.T) {
	for _, op := range []string{"runtime.Find", "task.Status"} {
		t.Run(op, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.m.SetBusy(busy)
				w.start(nil)
				a := w.run(spec("a", "sleep 20; exit 3"))
				w.leave()
				var away atomic.Bool
				away.Store(true)
				w.m.SetFault(func(o, _ string) error {
					if o == op && away.Load() {
						return errInjected
					}
					return nil
				})
				w.start(nil)
				// Whoever wants to go in waits for it, not for ever.
				began := time.Now()
				if _, err := w.sup.Task(t.Context(), a.ID); !errors.Is(err, runtime.ErrNotRunning) || time.Since(began) < 8*time.Second {
					t.Errorf("after %s: %v", time.Since(began), err)
				}
				if !w.m.LinkUp(a.ID) || strings.Contains(kinds(w.record(a.ID)), "drift") {
					t.Errorf("link up %t, events %s", w.m.LinkUp(a.ID), kinds(w.record(a.ID)))
				}
				away.Store(false)
				if task, err := w.sup.Task(t.Context(), a.ID); err != nil || task == nil {
					t.Errorf("adopted, but: %v", err)
				}
				if rec := w.wait(a.ID); rec.Exit.Code != 3 {
					t.Errorf("got %+v, want code 3", *rec.Exit)
				}
				w.checkGone()
			})
		})
		t.Run(op+", never started", func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				f := faults{point: "start:recorded", nth: 1, do: w.die}
				w.start(f.fault)
				id := w.create(spec("a", "sleep 20")).ID
				w.killed()
				var asked atomic.Int64
				w.m.SetFault(func(o, _ string) error {
					if o == op && asked.Add(1) <= 3 {
						return errInjected
					}
					return nil
				})
				w.start(nil)
				if rec := w.wait(id); rec.Exit.Reason != sandbox.LaunchFailed {
					t.Errorf("got %+v, want launch_failed", *rec.Exit)
				}
				w.checkGone()
			})
		})
	}
}

// TestRuntimeAwayWhileItRuns: containerd is killed and comes back; the sandbox
// neither knows nor cares.
func TestRuntimeAwayWhileItRuns(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.m.SetBusy(busy)
		w.start(nil)
		a := w.run(spec("a", "sleep 30; exit 3"))
		var away atomic.Bool
		away.Store(true)
		w.m.SetFault(func(op, _ string) error {
			if away.Load() && (strings.HasPrefix(op, "runtime.") || strings.HasPrefix(op, "task.")) {
				return errInjected
			}
			return nil
		})
		time.Sleep(10 * time.Second)
		away.Store(false)
		if rec := w.wait(a.ID); rec.Exit.Code != 3 {
			t.Errorf("got %+v, want code 3", *rec.Exit)
		}
		w.checkGone()
	})
}
