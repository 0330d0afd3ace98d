// SPDX-License-Identifier: Apache-2.0

package supervisor_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// The name that testdata/acme-v1 and -v2 allow; -v4 allows none.
const models = "models.example.com"

var modelsAddr = netip.MustParseAddr("198.51.100.7")

// modelsFlow is what the name opens.
var modelsFlow = netpol.Flow{Proto: netpol.TCP, Dst: modelsAddr, Port: 443}

// resolve asks for the name and fails the test without an answer.
func (w *world) resolve(rec sandbox.Record) {
	w.t.Helper()
	if !w.proc.Resolve(rec.ID, models, modelsAddr) {
		w.t.Fatalf("%s does not resolve for %s", models, rec.Spec.Name)
	}
	w.checkLearned(rec, true)
}

// checkLearned asserts whether the name's address is open.
func (w *world) checkLearned(rec sandbox.Record, want bool) {
	w.t.Helper()
	if got := w.m.SendTo(rec.ID, modelsFlow, 1); got != want {
		w.t.Errorf("%s: the name's address is open: %t, want %t", rec.Spec.Name, got, want)
	}
}

func TestLearnedSurvivesAgents(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a, b := w.run(spec("a", "sleep 1000")), w.run(spec("b", "sleep 1000"))
		w.checkLearned(a, false)
		w.resolve(a)
		w.checkLearned(b, false) // it is another's
		for _, leave := range []func(){w.leave, func() { _ = w.die(); w.killed() }} {
			leave()
			w.checkLearned(a, true)
			w.start(nil)
			w.checkLearned(a, true)
			time.Sleep(time.Second)
			w.checkLearned(a, true)
			w.resolve(a) // by the new agent
		}
		if k := kinds(w.record(a.ID)); strings.Contains(k, "drift") || strings.Contains(k, "not_enforced") {
			t.Errorf("events: %s", k)
		}
		w.m.TakeOff(a.ID)
		time.Sleep(6 * time.Second)
		w.checkLearned(a, true)
		w.stop(a.ID, -1)
		w.stop(b.ID, -1)
		w.wait(a.ID)
		w.wait(b.ID)
		w.checkGone()
	})
}

// TestReloadKeepsWhatIsStillAllowed: what names have taught lives through a
// change of policy that still allows them and ends with one that does not.
func TestReloadKeepsWhatIsStillAllowed(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 1000"))
		w.resolve(a)
		if n, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2")); err != nil || n != 1 {
			t.Fatalf("%d updated, %v", n, err)
		}
		w.checkLearned(a, true)
		w.checkBulk(a, false)
		w.resolve(a)
		if limit, ok := w.m.Budget("acme", 0); !ok || limit != 2<<30 {
			t.Errorf("the tenant's budget is %d, want the new 2 GiB", limit)
		}
		if _, err := w.sup.Reload(t.Context(), tenants(t, "acme-v4")); err != nil {
			t.Fatal(err)
		}
		w.checkLearned(a, false)
		if w.proc.Resolve(a.ID, models, modelsAddr) {
			t.Error("a name that is no longer allowed resolves")
		}
	})
}

// TestBrokenReloadKeepsNames: after a reload that fails, resolver and kernel
// still work by the old policy, budgets included.
func TestBrokenReloadKeepsNames(t *testing.T) {
	for _, op := range []string{"egress.SetPolicy", "names.Swap", "budgets.Ensure", "store.PutAll"} {
		inWorld(t, func(t *testing.T, w *world) {
			w.start(nil)
			a, b := w.run(spec("a", "sleep 1000")), w.run(spec("b", "sleep 1000"))
			w.resolve(a)
			w.resolve(b)
			n := 0
			w.m.SetFault(func(o, _ string) error {
				if o == op {
					if n++; n == 1 && op == "store.PutAll" || n == 2 {
						return errInjected
					}
				}
				return nil
			})
			if _, err := w.sup.Reload(t.Context(), tenants(t, "acme-v4")); err == nil {
				t.Fatalf("%s: the reload was not broken", op)
			}
			w.m.SetFault(nil)
			for _, rec := range []sandbox.Record{a, b} {
				w.checkLearned(rec, true)
				w.resolve(rec)
			}
			if limit, ok := w.m.Budget("acme", 0); !ok || limit != 1<<30 {
				t.Errorf("%s: the tenant's budget is %d, want the old 1 GiB", op, limit)
			}
		})
	}
}

// TestBrokenReloadPutsBudgetsBack: one whose policy the kernel refuses has the
// budgets of its old policy again, too.
func TestBrokenReloadPutsBudgetsBack(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 1000"))
		w.m.SetFault(func(op, _ string) error {
			if op == "egress.SetPolicy" {
				if limit, _ := w.m.Budget("acme", 0); limit != 2<<30 {
					t.Errorf("the policy comes before its budget, which is %d", limit)
				}
				return errInjected
			}
			return nil
		})
		if _, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2")); err == nil {
			t.Fatal("the reload was not broken")
		}
		w.m.SetFault(nil)
		if limit, _ := w.m.Budget("acme", 0); limit != 1<<30 {
			t.Errorf("the tenant's budget is %d, want the old 1 GiB", limit)
		}
		w.checkBulk(a, true)
	})
}

func TestNamesChangeWhileTheAgentIsAway(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 1000"))
		w.resolve(a)
		w.leave()
		w.tenants = tenants(t, "acme-v2")
		w.start(nil)
		time.Sleep(time.Second)
		w.checkLearned(a, true)
		w.checkBulk(a, false)
		w.resolve(a)
		w.leave()
		w.tenants = tenants(t, "acme-v4")
		w.start(nil)
		time.Sleep(time.Second)
		w.checkLearned(a, false)
	})
}

// TestReloadDuringTheNamesStep: the resolver never works by another policy than
// the kernel, wherever a reload comes between.
func TestReloadDuringTheNamesStep(t *testing.T) {
	for _, point := range []string{"place", "egress:do", "egress:done", "names:do", "names:done", "start:do"} {
		inWorld(t, func(t *testing.T, w *world) {
			f := faults{point: point, nth: 1}
			f.do = func() error {
				_, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2"))
				return err
			}
			w.start(f.fault)
			a := w.run(spec("a", "sleep 1000"))
			w.resolve(a)
			w.checkBulk(a, false)
		})
	}
}

// TestNoResolver: where no name resolves a policy that allows one is refused
// in words, and what runs already runs on.
func TestNoResolver(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 1000"))
		w.resolve(a)
		w.leave()
		w.edit = func(c *supervisor.Config) { c.Names = nil }
		w.start(nil)
		time.Sleep(time.Second)
		if rec := w.record(a.ID); rec.State != sandbox.Running || !w.m.SendTo(a.ID, api, 1) {
			t.Errorf("a sandbox of before is %s: %s", rec.State, kinds(rec))
		}
		_, err := w.sup.Create(t.Context(), spec("b", "exit 0"), "uid:7")
		if !isSpecError(err) || !strings.Contains(err.Error(), "rule models of acme allows models.example.com") || !strings.Contains(err.Error(), "dns.upstreams") {
			t.Errorf("create: got %v", err)
		}
		if _, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2")); err == nil || !strings.Contains(err.Error(), "dns.upstreams") {
			t.Errorf("reload: got %v", err)
		}
		w.checkBulk(a, true)
		if _, err := w.sup.Reload(t.Context(), tenants(t, "acme-v4")); err != nil {
			t.Errorf("reload to a policy without names: %v", err)
		}
		own := spec("own", "exit 0")
		own.Policy = "kind: EgressPolicy\nname: own\nrules:\n- name: no\n  action: deny\n  to: [{fqdn: evil.example.com}]\n"
		w.wait(w.create(own).ID) // a name that is refused needs no resolver
	})
	inWorld(t, func(t *testing.T, w *world) { // the names come between decision and reservation
		w.tenants = tenants(t, "acme-v4")
		w.edit = func(c *supervisor.Config) { c.Names = nil }
		w.start(nil)
		w.m.SetFault(func(op, _ string) error {
			if op == "runtime.Image" {
				_, err := w.sup.Reload(t.Context(), tenants(t, "acme-v1"))
				return err
			}
			return nil
		})
		if _, err := w.sup.Create(t.Context(), spec("a", "exit 0"), "uid:7"); !isSpecError(err) {
			t.Errorf("create: got %v", err)
		}
	})
}

// TestResolverThatCannotListen: an adopted sandbox that holds the resolver's
// port against it is still enforced, and keeps what it has learned.
func TestResolverThatCannotListen(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 1000"))
		w.resolve(a)
		w.leave()
		w.m.SetFault(func(op, _ string) error {
			if op == "names.Start" {
				return supervisor.ErrNoResolver
			}
			return nil
		})
		w.start(nil)
		time.Sleep(time.Second)
		w.checkLearned(a, true)
		if rec := w.record(a.ID); rec.State != sandbox.Running || !strings.Contains(kinds(rec), "no_resolver") {
			t.Errorf("it is %s: %s", rec.State, kinds(rec))
		}
		rec, err := w.sup.Launched(t.Context(), w.create(spec("b", "exit 0")).ID)
		if err != nil || rec.Exit == nil || rec.Exit.Reason != sandbox.LaunchFailed {
			t.Errorf("a launch without a resolver: %+v, %v", rec.Exit, err)
		}
	})
}

// TestBudgetsAreSettled: what was spent is on disk before the kernel forgets
// it, however often that has to be tried.
func TestBudgetsAreSettled(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 5"))
		if limit, ok := w.m.Budget("acme", a.Slot); !ok || limit != 1<<20 {
			t.Errorf("the sandbox's budget is %d, want 1 MiB", limit)
		}
		left := 3
		w.m.SetFault(func(op, id string) error {
			switch {
			case op == "budgets.Release" && left > 0:
				left--
				return errInjected
			case op == "egress.Detach" && left > 0:
				t.Error("the kernel forgets a budget that is not settled")
			}
			return nil
		})
		w.wait(a.ID)
		if left != 0 {
			t.Errorf("%d faults are left", left)
		}
		w.m.SetFault(nil)
		w.checkGone()
		if _, ok := w.m.Budget("acme", 0); !ok {
			t.Error("the tenant's budget went with one sandbox")
		}
	})
}
