// SPDX-License-Identifier: Apache-2.0

package crash

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/test/rig"
)

// life sends ten datagrams of 100 bytes, headers included, and ends with a code
// of its own.
const life = `
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(10):
    s.sendto(b"x" * 72, ("203.0.113.10", 5353))
    time.sleep(0.07)
raise SystemExit(3)
`

// listen takes the datagrams, so that no error message comes back.
func (n *node) listen() {
	n.t.Helper()
	err := n.Net.Inside("api", func() error {
		c, err := net.ListenPacket("udp", ":5353")
		if err == nil {
			n.t.Cleanup(func() { c.Close() })
		}
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

// TestKilledAtEveryPoint: at every point that the agent passes in the life of a
// sandbox, kill -9. The next agent brings it to its end, whichever that is, and
// nothing is left or billed twice.
func TestKilledAtEveryPoint(t *testing.T) {
	n := open(t)
	n.listen()
	run := []string{"run", "-d", "--tenant", "acme", "--cpus", "1", "--memory", "64MiB", "--name"}
	n.stopAgent()
	points := filepath.Join(t.TempDir(), "points")
	n.armed(points)
	n.must(append(run, "whole", python, "python3", "-c", life)...)
	if code := n.must("wait", "whole"); code != "3" {
		t.Fatalf("a whole life ends with %s", code)
	}
	time.Sleep(200 * time.Millisecond)
	n.stopAgent()
	data, err := os.ReadFile(points)
	if err != nil {
		t.Fatal(err)
	}
	n.startAgent()
	if got := n.delivered(n.get("whole").Sandbox.ID); got["egress_bytes"] != 1000 || got["ingress_bytes"] != 0 {
		t.Fatalf("a whole life is billed %v, want 1000 bytes of egress", got)
	}

	var all []string
	seen := map[string]int{}
	for _, p := range strings.Fields(string(data)) {
		if seen[p]++; seen[p] <= 2 { // usage is recorded again and again
			all = append(all, fmt.Sprintf("%s/%d", p, seen[p]))
		}
	}
	for _, must := range []string{"place", "cgroup:do", "link:do", "egress:do", "task:do", "start:do", "start:recorded", "start:done", "stopping",
		"start:undo", "task:undo", "egress:undo", "link:undo", "cgroup:undo", "usage", "stopped", "release", "usage:marked", "usage:spooled"} {
		if !slices.Contains(all, must+"/1") {
			t.Errorf("a whole life does not pass %s", must)
		}
	}
	for i, point := range all {
		t.Run(point, func(t *testing.T) {
			n := &node{Rig: n.Rig, t: t}
			t.Cleanup(n.clear)
			name := fmt.Sprintf("life-%d", i)
			n.stopAgent()
			n.armed(point)
			// It may be killed before it has answered; then run says so.
			_, _ = n.CLI(append(run, name, python, "python3", "-c", life)...)
			select {
			case <-n.AgentDead():
			case <-time.After(20 * time.Second):
				t.Fatal("the agent was not killed")
			}
			n.startAgent()
			n.must("wait", name)
			rec := n.get(name)
			eventually(t, "its end is on disk", func() bool { rec = n.get(name); return rec.Sandbox.State == "STATE_STOPPED" })
			x := rec.Sandbox.Exit
			got := n.delivered(rec.Sandbox.ID)
			switch {
			case strings.Contains(x.Reason, "EXITED"):
				if x.Code != 3 || got["egress_bytes"] != 1000 || got["ingress_bytes"] != 0 {
					t.Errorf("it ran to its end: %+v, billed %v; want code 3 and 1000 bytes", x, got)
				}
			case strings.Contains(x.Reason, "LAUNCH_FAILED"):
				if got["egress_bytes"] != 0 || got["ingress_bytes"] != 0 || !strings.Contains(x.Message, "restarted during the launch") {
					t.Errorf("it never ran: %+v, billed %v", x, got)
				}
			default:
				t.Errorf("it ended with %+v", x)
			}
			n.checkGone(rec.Sandbox.ID)
			n.must("rm", name)
		})
	}
	if left := n.Containerd.Leftovers(); len(left) > 0 {
		t.Errorf("left of containers: %q", left)
	}
	if out := n.must("node"); strings.Contains(out, "unknown sandbox") || strings.Contains(out, "torn down") {
		t.Errorf("node warns:\n%s", out)
	}
}

// TestKilledAtAnyMoment kills the agent while it waits for others, too: what
// containerd finishes for a dead agent is removed by the next one.
func TestKilledAtAnyMoment(t *testing.T) {
	n := open(t)
	n.listen()
	var ids []string
	for delay := time.Duration(0); delay < 240*time.Millisecond; delay += 12 * time.Millisecond {
		name := "moment-" + strings.ReplaceAll(delay.String(), ".", "")
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = n.CLI("run", "-d", "--tenant", "acme", "--cpus", "1", "--memory", "64MiB", "--name", name, python, "python3", "-c", life)
		}()
		time.Sleep(delay)
		if err := n.KillAgent(); err != nil {
			t.Fatal(err)
		}
		n.startAgent()
		<-done
		if !strings.Contains(n.must("ls", "-a"), name) {
			continue // killed before it was admitted
		}
		n.must("wait", name)
		rec := n.get(name)
		got := n.delivered(rec.Sandbox.ID)
		ran := strings.Contains(rec.Sandbox.Exit.Reason, "EXITED") && rec.Sandbox.Exit.Code == 3
		failed := strings.Contains(rec.Sandbox.Exit.Reason, "LAUNCH_FAILED")
		if !ran && !failed || ran && got["egress_bytes"] != 1000 || failed && got["egress_bytes"] != 0 {
			t.Errorf("killed after %s: %+v, billed %v", delay, rec.Sandbox.Exit, got)
		}
		ids = append(ids, rec.Sandbox.ID)
	}
	time.Sleep(time.Second)
	for _, id := range ids {
		n.checkGone(id)
	}
	if left := n.Containerd.Leftovers(); len(left) > 0 {
		t.Errorf("left of containers: %q", left)
	}
	if len(ids) < 5 {
		t.Errorf("only %d sandboxes were admitted", len(ids))
	}
}

// pump sends over one connection for ever, and prints what it has sent.
const pump = `
import socket, time
s = socket.create_connection(("203.0.113.10", 5001))
while True:
    s.sendall(b"x" * 5000)
    time.sleep(0.01)
`

// TestKilledEverySecond: agent and gateway are killed again and again while a
// sandbox sends. No verdict changes, counters only grow, and in the end ledger
// and wire agree to the byte.
func TestKilledEverySecond(t *testing.T) {
	n := open(t)
	n.must("run", "-d", "--name", "pump", "--tenant", "acme", "--cpus", "1", "--memory", "64MiB", python, "sleep", "3600")
	before := n.get("pump")
	id := before.Sandbox.ID
	capture, err := rig.OpenCapture(rig.LinkPrefix+id, isAPI)
	if err != nil {
		t.Fatal(err)
	}
	// The connection outlives the exec stream only if it is in the background.
	n.must("exec", "pump", "sh", "-c", "python3 -c '"+pump+"' >/dev/null 2>&1 </dev/null & echo started")
	sends := func() bool {
		start := n.Net.Received.Load()
		time.Sleep(200 * time.Millisecond)
		return n.Net.Received.Load() > start
	}
	eventually(t, "the pump sends", sends)
	counted := 0
	for round := range 12 {
		if err := n.KillAgent(); err != nil {
			t.Fatal(err)
		}
		if round%4 == 1 {
			if err := n.KillGateway(); err != nil {
				t.Fatal(err)
			}
		}
		if !sends() {
			t.Errorf("round %d: with no agent the pump does not send", round)
		}
		if reached, err := rig.DialFrom(before.Sandbox.Pid, rig.Forbidden4.String()+":80", 150*time.Millisecond); err != nil || reached {
			t.Errorf("round %d: with no agent the forbidden host is reached: %t, %v", round, reached, err)
		}
		if reached, err := rig.DialFrom(before.Sandbox.Pid, rig.API4.String()+":80", time.Second); err != nil || !reached {
			t.Errorf("round %d: with no agent the API is not reached: %v", round, err)
		}
		if round%4 == 3 {
			if err := n.StartGateway(); err != nil {
				t.Fatal(err)
			}
		}
		n.startAgent()
		time.Sleep(time.Duration(round*60) * time.Millisecond) // die at another moment of the start, too
		rec := n.get("pump")
		now := number(rec.Network.EgressBytes)
		if now <= counted || rec.Sandbox.Pid != before.Sandbox.Pid && rec.Sandbox.Pid != "0" {
			t.Errorf("round %d: counter went from %d to %d, pid from %s to %s", round, counted, now, before.Sandbox.Pid, rec.Sandbox.Pid)
		}
		counted = now
	}
	if err := n.StartGateway(); err != nil {
		t.Fatal(err)
	}
	rec := n.get("pump")
	if k := rec.kinds(); strings.Contains(k, "drift") || strings.Contains(k, "policy") || !strings.Contains(k, "adopted") {
		t.Errorf("events: %s", k)
	}
	n.must("exec", "pump", "sh", "-c", "kill $(pidof python3); sleep 0.5")
	wire, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	n.must("stop", "pump")
	got := n.delivered(id)
	if got["egress_bytes"] != wire.Sent || got["ingress_bytes"] != wire.Received || wire.Sent < 1<<20 {
		t.Errorf("billed %d bytes out and %d in, the capture has %d and %d", got["egress_bytes"], got["ingress_bytes"], wire.Sent, wire.Received)
	}
	n.checkGone(id)
}

// TestContainerdKilled: sandboxes run on and are the agent's again when
// containerd is back, whether or not the agent was killed meanwhile as well.
func TestContainerdKilled(t *testing.T) {
	for _, both := range []bool{false, true} {
		t.Run(fmt.Sprintf("agent too %t", both), func(t *testing.T) {
			n := open(t)
			n.must("run", "-d", "--name", "long", "--tenant", "acme", "--cpus", "500m", "--memory", "64MiB", python,
				"sh", "-c", "trap 'echo bye; exit 4' TERM; echo hi; while :; do sleep 0.1; done")
			n.must("run", "-d", "--name", "brief", "--tenant", "acme", "--cpus", "500m", "--memory", "64MiB", python, "sh", "-c", "sleep 1; echo done; exit 6")
			long, brief := n.get("long").Sandbox, n.get("brief").Sandbox
			if err := n.Containerd.Kill(); err != nil {
				t.Fatal(err)
			}
			if both {
				if err := n.KillAgent(); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(1500 * time.Millisecond) // brief ends while nobody looks
			if _, err := os.Stat("/proc/" + long.Pid); err != nil {
				t.Errorf("the sandbox does not run on: %v", err)
			}
			if err := n.Containerd.Up(); err != nil {
				t.Fatal(err)
			}
			if both {
				n.startAgent()
			}
			if got := n.must("wait", "brief"); got != "6" {
				t.Errorf("what ended meanwhile has code %s, want 6: %+v", got, n.get("brief").Sandbox.Exit)
			}
			if got := n.must("logs", "brief"); got != "done" {
				t.Errorf("its log: %q", got)
			}
			eventually(t, "exec works again", func() bool {
				out, err := n.CLI("exec", "long", "echo", "alive")
				return err == nil && out == "alive"
			})
			if rec := n.get("long"); rec.Sandbox.Pid != long.Pid || strings.Contains(rec.kinds(), "drift") {
				t.Errorf("pid %s, was %s; events %s", rec.Sandbox.Pid, long.Pid, rec.kinds())
			}
			n.must("stop", "long")
			if got := n.must("wait", "long"); got != "4" {
				t.Errorf("stop: code %s, want 4", got)
			}
			if got := n.must("logs", "long"); got != "hi\nbye" {
				t.Errorf("log: %q", got)
			}
			n.checkGone(long.ID)
			n.checkGone(brief.ID)
			n.must("rm", "long", "brief")
		})
	}
}

// TestShimKilled: a sandbox whose shim was killed is lost, and nothing of it
// stays.
func TestShimKilled(t *testing.T) {
	n := open(t)
	n.must("run", "-d", "--name", "a", "--tenant", "acme", "--cpus", "500m", "--memory", "64MiB", python, "sleep", "3600")
	rec := n.get("a")
	shims := n.Containerd.ShimPids(rec.Sandbox.ID)
	if len(shims) != 1 {
		t.Fatalf("shims: %v", shims)
	}
	kill(t, shims[0])
	n.must("wait", "a")
	rec = n.get("a")
	if rec.Sandbox.State != "STATE_STOPPED" {
		t.Errorf("state %s", rec.Sandbox.State)
	}
	if _, err := os.Stat("/proc/" + rec.Sandbox.Pid); rec.Sandbox.Pid != "0" && rec.Sandbox.Pid != "" && err == nil {
		t.Errorf("process %s still runs", rec.Sandbox.Pid)
	}
	n.checkGone(rec.Sandbox.ID)
	if got := n.delivered(rec.Sandbox.ID); got["wall_ms"] == 0 {
		t.Errorf("billed %v", got)
	}
}

// TestStateLost: an agent whose records are gone names what it finds, leaves it
// alone, and works beside it. With the records it is its own again.
func TestStateLost(t *testing.T) {
	n := open(t)
	n.must("run", "-d", "--name", "orphan", "--tenant", "acme", "--cpus", "500m", "--memory", "64MiB", python, "python3", "-c", pump)
	rec := n.get("orphan")
	sends := func() bool {
		start := n.Net.Received.Load()
		time.Sleep(300 * time.Millisecond)
		return n.Net.Received.Load() > start
	}
	eventually(t, "the pump sends", sends)
	state, away := filepath.Join(n.Dir, "state"), filepath.Join(n.Dir, "state-away")
	n.stopAgent()
	if err := os.Rename(state, away); err != nil {
		t.Fatal(err)
	}
	back := sync.OnceFunc(func() {
		n.stopAgent()
		if err := os.RemoveAll(state); err != nil {
			t.Error(err)
		}
		if err := os.Rename(away, state); err != nil {
			t.Error(err)
		}
		n.startAgent()
	})
	defer back()
	n.startAgent()
	if out := n.must("node"); !strings.Contains(out, "unknown sandbox "+rec.Sandbox.ID) || !strings.Contains(out, "left alone") {
		t.Errorf("node says:\n%s", out)
	}
	if out := n.must("run", "--rm", "--tenant", "acme", python, "echo", "beside it"); out != "beside it" {
		t.Errorf("run beside it: %s", out)
	}
	if !sends() {
		t.Error("the unknown sandbox does not send any more")
	}
	if reached, err := rig.DialFrom(rec.Sandbox.Pid, rig.Forbidden4.String()+":80", 150*time.Millisecond); err != nil || reached {
		t.Errorf("the unknown sandbox reaches the forbidden host: %t, %v", reached, err)
	}
	back()
	eventually(t, "it is adopted", func() bool { return strings.Contains(n.get("orphan").kinds(), "adopted") })
	n.must("stop", "orphan")
	n.checkGone(rec.Sandbox.ID)
}
