// SPDX-License-Identifier: Apache-2.0

package supervisor_test

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
)

// lastOf answers the message of the last event of a kind.
func lastOf(rec sandbox.Record, kind string) string {
	for i := len(rec.Events) - 1; i >= 0; i-- {
		if rec.Events[i].Kind == kind {
			return rec.Events[i].Message
		}
	}
	return ""
}

func TestLinkDriftIsRepaired(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a, b := w.run(publishing("a", "sleep 1000", tcp(30001, 80))), w.run(spec("b", "sleep 1000"))
		w.m.SetFault(func(op, id string) error {
			if op == "links.Create" && w.m.LinkUp(id) {
				t.Error("the link is repaired while it is up")
			}
			return nil
		})
		w.m.Disturb(a.ID, "there is no route to 100.96.0.1")
		time.Sleep(6 * time.Second)
		if !w.m.SendTo(a.ID, api, 1) {
			t.Error("it is not repaired")
		}
		rec := w.record(a.ID)
		if k := kinds(rec); !strings.HasSuffix(k, "drift repaired") || !strings.Contains(lastOf(rec, "drift"), "no route to 100.96.0.1") {
			t.Errorf("events %s: %s", k, lastOf(rec, "drift"))
		}
		if k := kinds(w.record(b.ID)); strings.Contains(k, "drift") {
			t.Errorf("another sandbox: %s", k)
		}
		w.checkPublished(a, tcp(30001, 80))
		if verified, why := w.sup.Enforced(a.ID); why != "" || time.Since(verified) > 10*time.Second {
			t.Errorf("enforced: verified %s, %q", verified, why)
		}
	})
}

// TestRepairIsVerified: a link that is still not right once it is up goes down
// again until the next try.
func TestRepairIsVerified(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 1000"))
		w.m.SetFault(func(op, _ string) error {
			if op == "links.Verify" {
				return errInjected
			}
			return nil
		})
		time.Sleep(12 * time.Second)
		if rec := w.record(a.ID); w.m.LinkUp(a.ID) || rec.State != sandbox.Running {
			t.Errorf("link up %t, %s", w.m.LinkUp(a.ID), rec.State)
		}
		w.m.SetFault(nil)
		time.Sleep(6 * time.Second)
		if k := kinds(w.record(a.ID)); !w.m.LinkUp(a.ID) || strings.Count(k, "drift") != 1 || !strings.HasSuffix(k, "repaired") {
			t.Errorf("link up %t, events %s", w.m.LinkUp(a.ID), k)
		}
	})
}

// TestTableDrift: what all links share is put right with all of them down, and
// the node says so meanwhile.
func TestTableDrift(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a, b := w.run(spec("a", "sleep 1000")), w.run(spec("b", "sleep 1000"))
		var failing atomic.Int64
		failing.Store(2)
		w.m.SetFault(func(op, _ string) error {
			if op == "links.Restore" {
				if w.m.LinkUp(a.ID) || w.m.LinkUp(b.ID) {
					t.Error("the table is put right while a link is up")
				}
				if failing.Add(-1) >= 0 {
					return errInjected
				}
			}
			return nil
		})
		w.m.DisturbTable("chain forward has lost the mark rule")
		time.Sleep(7 * time.Second)
		warns := strings.Join(w.sup.Warnings(), "\n")
		for _, want := range []string{"second layer", "lost the mark rule", "sandbox a", "sandbox b"} {
			if !strings.Contains(warns, want) {
				t.Errorf("warnings do not say %q: %s", want, warns)
			}
		}
		if _, why := w.sup.Enforced(a.ID); !strings.Contains(why, "lost the mark rule") {
			t.Errorf("enforced: %q", why)
		}
		if w.m.LinkUp(a.ID) || w.m.LinkUp(b.ID) {
			t.Error("a link is up while the table is not as it must be")
		}
		time.Sleep(10 * time.Second)
		for _, rec := range []sandbox.Record{a, b} {
			rec = w.record(rec.ID)
			if !w.m.SendTo(rec.ID, api, 1) || !strings.HasSuffix(kinds(rec), "drift repaired") {
				t.Errorf("%s: link up %t, events %s", rec.Spec.Name, w.m.LinkUp(rec.ID), kinds(rec))
			}
		}
		if warns := w.sup.Warnings(); len(warns) != 0 {
			t.Errorf("once all is repaired: %q", warns)
		}
	})
}

// TestTableThatStaysWrong: sandboxes are stopped, and the node says why.
func TestTableThatStaysWrong(t *testing.T) {
	for _, op := range []string{"links.Restore", "links.VerifyTable"} {
		inWorld(t, func(t *testing.T, w *world) {
			w.start(nil)
			a := w.run(spec("a", "sleep 1000"))
			w.m.SetFault(func(o, _ string) error {
				if o == op {
					return errInjected
				}
				return nil
			})
			w.m.DisturbTable("gone")
			if rec := w.wait(a.ID); !strings.Contains(rec.Exit.Message, "egress could not be enforced") {
				t.Errorf("%s: got %+v", op, *rec.Exit)
			}
			if warns := strings.Join(w.sup.Warnings(), "\n"); !strings.Contains(warns, "second layer") || strings.Contains(warns, "sandbox a") {
				t.Errorf("%s: warnings %s", op, warns)
			}
			w.m.SetFault(nil)
			time.Sleep(6 * time.Second)
			w.checkGone()
		})
	}
}

// TestPolicyFailed: a kernel that has no room for a policy keeps the old one,
// and operator and owner are told.
func TestPolicyFailed(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a, b := w.run(spec("a", "sleep 1000")), w.run(spec("b", "sleep 1000"))
		w.m.SetFault(func(op, id string) error {
			if op == "egress.SetPolicy" && id == b.ID {
				return errInjected
			}
			return nil
		})
		_, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2"))
		if err == nil || !strings.Contains(err.Error(), "sandbox b of acme") || !strings.Contains(err.Error(), "injected") {
			t.Errorf("reload: got %v", err)
		}
		w.checkBulk(a, true)
		w.checkBulk(b, true)
		if rec := w.record(b.ID); !strings.Contains(lastOf(rec, "policy_failed"), "injected") {
			t.Errorf("events: %s", kinds(rec))
		}
		if rec := w.record(a.ID); strings.Contains(kinds(rec), "policy_failed") {
			t.Errorf("events of another: %s", kinds(rec))
		}
		warns := w.sup.Warnings()
		if len(warns) != 1 || !strings.Contains(warns[0], "sandbox b") {
			t.Errorf("warnings: %q", warns)
		}
		w.m.SetFault(nil)
		if _, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2")); err != nil {
			t.Fatal(err)
		}
		w.checkBulk(b, false)
		if warns := w.sup.Warnings(); len(warns) != 0 {
			t.Errorf("once it works: %q", warns)
		}
	})
}
