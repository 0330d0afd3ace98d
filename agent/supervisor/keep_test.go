// SPDX-License-Identifier: Apache-2.0

package supervisor_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/supervisor"
)

// TestOldestStoppedAreForgotten: a tenant that runs one sandbox after the
// other does not fill the disk with their records and logs.
func TestOldestStoppedAreForgotten(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.edit = func(c *supervisor.Config) { c.KeepStopped = 3 }
		w.start(nil)
		for i := range 6 {
			rec := w.create(spec(fmt.Sprintf("n%d", i), "exit 0"))
			w.wait(rec.ID)
			time.Sleep(time.Second)
		}
		var names []string
		for _, rec := range w.sup.List() {
			names = append(names, rec.Spec.Name)
		}
		if got := strings.Join(names, " "); got != "n3 n4 n5" {
			t.Errorf("kept %q, want the last three", got)
		}
	})
}

// TestOwnPolicyDoesNotHoldUpAReload: a sandbox whose own policy no longer fits
// a tightened guardrail is cut off and stopped; the others get the new policy.
func TestOwnPolicyDoesNotHoldUpAReload(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		own := spec("own", "sleep 1000")
		own.Policy = "kind: EgressPolicy\nname: own\nrules:\n- name: wide\n  action: allow\n  to: [{cidr: 192.0.2.0/24}]\n  ports: [443/tcp]\n"
		a, b := w.run(own), w.run(spec("plain", "sleep 1000"))
		if _, err := w.sup.Reload(t.Context(), tenants(t, "acme-v3")); err != nil {
			t.Fatal(err)
		}
		if rec := w.wait(a.ID); !strings.Contains(rec.Exit.Message, "no longer fits") {
			t.Errorf("got %+v, want an exit that says why", rec.Exit)
		}
		if rec := w.record(b.ID); !strings.Contains(kinds(rec), "policy") {
			t.Errorf("the other sandbox has no new policy: %s", kinds(rec))
		}
	})
}

// TestDriftIsRepairedAtTheThirdTry: a repair that fails for a while leaves the
// sandbox running, its link down, until it works.
func TestDriftIsRepairedAtTheThirdTry(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(spec("a", "sleep 1000"))
		left := 2
		w.m.SetFault(func(op, _ string) error {
			if op == "egress.Attach" && left > 0 {
				left--
				return errInjected
			}
			return nil
		})
		w.m.TakeOff(a.ID)
		time.Sleep(time.Minute)
		rec := w.record(a.ID)
		if left != 0 || !w.m.LinkUp(a.ID) || strings.Count(kinds(rec), "drift") != 1 || !strings.Contains(kinds(rec), "repaired") {
			t.Errorf("%d faults left, link up %t, events %s", left, w.m.LinkUp(a.ID), kinds(rec))
		}
	})
}
