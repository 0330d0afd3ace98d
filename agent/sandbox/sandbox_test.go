// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/netpol"
)

func TestTransitions(t *testing.T) {
	all := []State{Admitted, Placed, Running, Paused, Stopping, Stopped, Lost}
	want := map[[2]State]bool{
		{Admitted, Placed}: true, {Admitted, Stopping}: true,
		{Placed, Running}: true, {Placed, Stopping}: true,
		{Running, Paused}: true, {Running, Stopping}: true,
		{Paused, Running}: true, {Paused, Stopping}: true,
		{Stopping, Stopped}: true,
	}
	for _, from := range all {
		for _, to := range all {
			r := Record{ID: "x", State: from}
			err := r.To(to)
			var bad *TransitionError
			switch {
			case want[[2]State{from, to}] && (err != nil || r.State != to):
				t.Errorf("%s to %s: %v", from, to, err)
			case !want[[2]State{from, to}] && (!errors.As(err, &bad) || r.State != from):
				t.Errorf("%s to %s: got %v in state %s, want a TransitionError", from, to, err, r.State)
			}
		}
	}
}

func TestIDs(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		id := NewID()
		if !ValidID(id) || seen[id] {
			t.Fatalf("id %q: valid %t, seen %t", id, ValidID(id), seen[id])
		}
		seen[id] = true
	}
	for _, bad := range []string{"", "abc", "ABCDEFGHIJKL", "abcdefghijk1", "abcdefghijkl/", "../../etc/pa"} {
		if ValidID(bad) {
			t.Errorf("%q is no id", bad)
		}
	}
}

func TestExplain(t *testing.T) {
	kill := 128 + int(syscall.SIGKILL)
	asked := &StopRequest{Reason: StoppedBy, By: "uid:7"}
	for _, c := range []struct {
		name string
		in   Ended
		want ExitReason
		text string
	}{
		{"own code", Ended{Code: 3}, Exited, "exited with code 3"},
		{"clean", Ended{}, Exited, "exited with code 0"},
		{"oom", Ended{Code: kill, OOMKilled: true, Limits: Limits{MemoryBytes: 64 << 20}}, OOM, "67108864"},
		{"a child was killed, the command coped", Ended{Code: 0, OOMKilled: true}, Exited, "code 0"},
		{"killed by a stranger", Ended{Code: kill}, Signaled, "signal 9"},
		{"stopped", Ended{Code: 143, Stop: asked}, StoppedBy, "uid:7"},
		{"stopped while out of memory", Ended{Code: kill, OOMKilled: true, Stop: asked}, StoppedBy, "uid:7"},
		{"lifetime", Ended{Code: kill, TTL: time.Minute, Stop: &StopRequest{Reason: TTL}}, TTL, "1m0s"},
	} {
		got := c.in.Explain()
		if got.Reason != c.want || !strings.Contains(got.Message, c.text) {
			t.Errorf("%s: got %s %q, want %s with %q", c.name, got.Reason, got.Message, c.want, c.text)
		}
	}
}

func spec() Spec { return Spec{Name: "a", Tenant: "acme", Image: "busybox"} }

func TestCheck(t *testing.T) {
	good := spec()
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		field string
		edit  func(*Spec)
	}{
		{"name", func(s *Spec) { s.Name = "a/b" }},
		{"name", func(s *Spec) { s.Name = ".." }},
		{"name", func(s *Spec) { s.Name = strings.Repeat("a", 300) }},
		{"name", func(s *Spec) { s.Name = "a\xff" }},
		{"name", func(s *Spec) { s.Name = "" }},
		{"name", func(s *Spec) { s.Name = NewID() }},
		{"tenant", func(s *Spec) { s.Tenant = "acme//x" }},
		{"tenant", func(s *Spec) { s.Tenant = "../etc" }},
		{"image", func(s *Spec) { s.Image = "" }},
		{"image", func(s *Spec) { s.Image = strings.Repeat("x", 1000) }},
		{"env", func(s *Spec) { s.Env = []string{"NOVALUE"} }},
		{"env", func(s *Spec) { s.Env = []string{"A=\x00"} }},
		{"command", func(s *Spec) { s.Command = make([]string, 5000) }},
		{"command", func(s *Spec) { s.Command = []string{strings.Repeat("x", 200<<10)} }},
		{"workdir", func(s *Spec) { s.Workdir = "tmp" }},
		{"ttl", func(s *Spec) { s.TTL = -1 }},
		{"ttl", func(s *Spec) { s.TTL = time.Millisecond }},
		{"runtime", func(s *Spec) { s.RuntimeClass = "gvisor" }},
		{"labels", func(s *Spec) { s.Labels = map[string]string{"": "x"} }},
	} {
		s := spec()
		c.edit(&s)
		err := s.Check()
		var bad *SpecError
		if !errors.As(err, &bad) || bad.Field != c.field {
			t.Errorf("%s: got %v", c.field, err)
		}
	}
}

func TestResolve(t *testing.T) {
	def := Limits{CPUMillis: 1000, MemoryBytes: 512 << 20, PIDs: 256}
	node := Limits{CPUMillis: 2000, MemoryBytes: 1 << 30, PIDs: 4096}
	got, err := Limits{}.Resolve(def, node)
	if err != nil || got != def {
		t.Errorf("defaults: got %+v, %v", got, err)
	}
	for _, bad := range []Limits{
		{CPUMillis: -1}, {CPUMillis: 1}, {CPUMillis: 3000},
		{MemoryBytes: -1}, {MemoryBytes: 1}, {MemoryBytes: 2 << 30},
		{PIDs: -1}, {PIDs: 5000},
	} {
		var e *SpecError
		if _, err := bad.Resolve(def, node); !errors.As(err, &e) {
			t.Errorf("%+v: got %v, want a SpecError", bad, err)
		}
	}
}

func TestEventsAreBounded(t *testing.T) {
	var r Record
	for i := range 500 {
		r.Log(time.Unix(int64(i), 0), "k", "%d", i)
	}
	if len(r.Events) != maxEvents || r.Events[maxEvents-1].Message != "499" {
		t.Errorf("got %d events, the last one %q", len(r.Events), r.Events[len(r.Events)-1].Message)
	}
}

func TestPublishIsChecked(t *testing.T) {
	for _, c := range []struct {
		ports []Port
		want  string // in the error; "" for none
	}{
		{[]Port{{8080, 80, netpol.TCP}, {8080, 80, netpol.UDP}, {8081, 80, netpol.TCP}}, ""},
		{[]Port{{0, 80, netpol.TCP}}, "0:80/tcp: write HOSTPORT:PORT"},
		{[]Port{{8080, 0, netpol.UDP}}, "8080:0/udp: write HOSTPORT:PORT"},
		{[]Port{{8080, 80, netpol.ICMP}}, "only tcp and udp"},
		{[]Port{{8080, 80, 0}}, "only tcp and udp"},
		{[]Port{{8080, 80, netpol.TCP}, {8080, 81, netpol.TCP}}, "port 8080/tcp of the node is named twice"},
		{make([]Port, netpol.MaxPublished+1), "at most 8"},
	} {
		s := Spec{Name: "a", Tenant: "acme", Image: "busybox", Publish: c.ports}
		err := s.Check()
		var bad *SpecError
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%v: %v", c.ports, err)
		case c.want != "" && (!errors.As(err, &bad) || bad.Field != "publish" || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%v: got %v, want %q", c.ports, err, c.want)
		}
	}
}
