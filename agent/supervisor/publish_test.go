// SPDX-License-Identifier: Apache-2.0

package supervisor_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/admit"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// publishing is a sandbox with published ports.
func publishing(name, command string, ports ...sandbox.Port) sandbox.Spec {
	s := spec(name, command)
	s.Publish = ports
	return s
}

func tcp(host, inside uint16) sandbox.Port {
	return sandbox.Port{Host: host, Sandbox: inside, Proto: netpol.TCP}
}

func (w *world) checkPublished(rec sandbox.Record, want ...sandbox.Port) {
	w.t.Helper()
	if got := w.m.Published(rec.ID); !slices.Equal(got, want) {
		w.t.Errorf("%s publishes %v, want %v", rec.Spec.Name, got, want)
	}
}

func TestPublish(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(publishing("a", "sleep 1000", tcp(30001, 80), tcp(30002, 80)))
		w.checkPublished(a, tcp(30001, 80), tcp(30002, 80))
		prog, err := w.sup.Program(a.ID)
		if err != nil || len(prog.Published) != 1 || prog.Published[0].Port != 80 {
			t.Errorf("program lets answers of %+v out (%v), want port 80", prog.Published, err)
		}
		if prog.Digest != w.record(a.ID).PolicyDigest {
			t.Error("the record names another policy than the one in force")
		}
		w.restart()
		time.Sleep(time.Second)
		w.checkPublished(a, tcp(30001, 80), tcp(30002, 80))
		if rec := w.record(a.ID); rec.PolicyRev != 1 {
			t.Errorf("a restart made policy revision %d", rec.PolicyRev)
		}
		if n, err := w.sup.Reload(t.Context(), tenants(t, "acme-v2")); err != nil || n != 1 {
			t.Fatalf("%d updated, %v", n, err)
		}
		if prog, _ := w.sup.Program(a.ID); len(prog.Published) != 1 {
			t.Error("a reload took the published port away")
		}
		w.stop(a.ID, -1)
		w.wait(a.ID)
		w.wait(w.run(publishing("b", "sleep 1", tcp(30001, 8080))).ID)
		w.checkGone()
	})
}

// TestPublishRefusals: each says what is wrong, and whose the port is only to
// those who may know.
func TestPublishRefusals(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		a := w.run(publishing("a", "sleep 1000", tcp(30001, 80)))
		other := publishing("b", "exit 0", tcp(30001, 80))
		other.Tenant = "globex"
		udp := publishing("c", "sleep 1000", sandbox.Port{Host: 30001, Sandbox: 80, Proto: netpol.UDP})
		for _, c := range []struct {
			spec     sandbox.Spec
			want     string
			unwanted string
		}{
			{publishing("b", "exit 0", tcp(30002, 80), tcp(30001, 81)), "sandbox a of acme has it", ""},
			{other, "a sandbox of another tenant has it", "acme"},
			{publishing("b", "exit 0", tcp(30100, 80)), "publishes 30000-30099", ""},
			{publishing("b", "exit 0", tcp(22, 80)), "publishes 30000-30099", ""},
		} {
			_, err := w.sup.Create(t.Context(), c.spec, "uid:7")
			var d *admit.Denied
			if !errors.As(err, &d) || d.Reason != admit.PublishPort || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v: got %v, want %q", c.spec.Publish, err, c.want)
			}
			if c.unwanted != "" && err != nil && strings.Contains(err.Error(), c.unwanted) {
				t.Errorf("%v: %v names another tenant", c.spec.Publish, err)
			}
		}
		w.run(udp) // another protocol's port is another port
		w.leave()
		w.edit = func(c *supervisor.Config) { c.PublishPorts = admit.Ports{} }
		w.start(nil)
		time.Sleep(time.Second)
		w.checkPublished(a, tcp(30001, 80)) // what runs keeps what it was given
		if _, err := w.sup.Create(t.Context(), publishing("d", "exit 0", tcp(30003, 80)), "uid:7"); err == nil || !strings.Contains(err.Error(), "network.publish_ports") {
			t.Errorf("with publishing off: got %v", err)
		}
	})
}

func TestPublishOnePortManyTimesAtOnce(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		errs := make(chan error, 8)
		for i := range 8 {
			go func() {
				_, err := w.sup.Create(t.Context(), publishing(fmt.Sprintf("s%d", i), "sleep 5", tcp(30001, 80)), "uid:7")
				errs <- err
			}()
		}
		admitted := 0
		for range 8 {
			if <-errs == nil {
				admitted++
			}
		}
		if admitted != 1 {
			t.Errorf("%d sandboxes were admitted with one port", admitted)
		}
		for _, rec := range w.sup.List() {
			w.wait(rec.ID)
		}
		w.checkGone()
	})
}

func TestPublishFails(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.start(nil)
		w.m.SetFault(func(op, _ string) error {
			if op == "links.Publish" {
				return errInjected
			}
			return nil
		})
		rec := w.wait(w.create(publishing("a", "sleep 5", tcp(30001, 80))).ID)
		if rec.Exit.Reason != sandbox.LaunchFailed || !strings.Contains(rec.Exit.Message, "injected") {
			t.Errorf("got %+v", *rec.Exit)
		}
		w.m.SetFault(nil)
		w.checkGone()
	})
}
