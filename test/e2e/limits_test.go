// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/test/rig"
)

// pour sends bytes to the sink until they are all out or nothing moves any
// more, and prints how long it took.
const pour = `
import socket, sys, time
left, began = int(sys.argv[1]), time.time()
s = socket.create_connection(("203.0.113.10", 5001), 3)
s.settimeout(1.5)
try:
    while left > 0: left -= s.send(b"x" * min(left, 16384))
    s.shutdown(socket.SHUT_WR); s.recv(1)
except OSError: pass
print(left, round(time.time() - began, 3))
`

// TestBudget: all sandboxes of a tenant together send no byte more than its
// budget, kill -9 of the agent or not, and explain says that it is spent.
func TestBudget(t *testing.T) {
	n := open(t)
	const budget = 256 << 10
	first, second := n.start("spend-1", "metered", python), n.start("spend-2", "metered", python)
	n.must("exec", "spend-1", "python3", "-c", pour, "100000")
	if err := n.KillAgent(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartAgent(); err != nil {
		t.Fatal(err)
	}
	before := number(n.get("spend-1").Network.EgressBytes)
	if before < 100000 || before >= budget {
		t.Fatalf("%d bytes are counted for 100000", before)
	}
	n.must("exec", "spend-2", "python3", "-c", pour, "1000000")
	n.must("exec", "spend-2", "python3", "-c", spendRest)
	spent := number(n.get("spend-1").Network.EgressBytes) + number(n.get("spend-2").Network.EgressBytes)
	// What is left is less than a datagram on every CPU.
	if spent > budget || spent <= budget-29*runtime.NumCPU() {
		t.Errorf("%d bytes left the tenant's sandboxes, the budget is %d", spent, budget)
	}
	if n.get("spend-2").dropped("budget") == 0 {
		t.Error("no packet was dropped for the budget")
	}
	for _, box := range []record{first, second} {
		if out := n.must("explain", box.Sandbox.ID, rig.API4.String()+":80"); !strings.Contains(out, "DENY") || !strings.Contains(out, "budget") || !strings.Contains(out, "metered") {
			t.Errorf("explain says:\n%s", out)
		}
	}
	// More of it opens the way again; a sandbox that starts now has the same.
	n.rewrite("metered.yaml", "256KiB", "512KiB")
	if out := n.must("explain", "spend-1", rig.API4.String()+":80"); !strings.Contains(out, "ALLOW") {
		t.Errorf("with a larger budget explain says:\n%s", out)
	}
	n.must("exec", "spend-1", "python3", "-c", pour, "1000000")
	n.must("exec", "spend-1", "python3", "-c", spendRest)
	n.start("spend-3", "metered", python)
	if out := n.must("explain", "spend-3", rig.API4.String()+":80"); !strings.Contains(out, "budget") {
		t.Errorf("of a sandbox that comes later explain says:\n%s", out)
	}
	total := 0
	for _, name := range []string{"spend-1", "spend-2", "spend-3"} {
		total += number(n.get(name).Network.EgressBytes)
	}
	if total > 2*budget || total <= 2*budget-29*runtime.NumCPU() {
		t.Errorf("%d bytes left, the budget is %d", total, 2*budget)
	}
}

// spendRest sends the shortest datagrams on every CPU, whose leases are not each
// other's, until less than one is left.
const spendRest = `
import os, socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for cpu in os.sched_getaffinity(0):
    os.sched_setaffinity(0, {cpu})
    for _ in range(200): s.sendto(b"x", ("203.0.113.10", 5353))
`

// TestRate: two sandboxes of a tenant together are no faster than its rate.
func TestRate(t *testing.T) {
	n := open(t)
	n.start("slow-1", "slow", python)
	n.start("slow-2", "slow", python)
	n.must("exec", "slow-1", "sh", "-c", "python3 -c '"+pour+"' 20000000 >/dev/null 2>&1 </dev/null & echo started")
	n.must("exec", "slow-2", "sh", "-c", "python3 -c '"+pour+"' 20000000 >/dev/null 2>&1 </dev/null & echo started")
	sent := func() int {
		return number(n.get("slow-1").Network.EgressBytes) + number(n.get("slow-2").Network.EgressBytes)
	}
	eventually(t, "both send", func() bool { return sent() > 500000 })
	began, before := time.Now(), sent()
	time.Sleep(3 * time.Second)
	bits := 8 * float64(sent()-before) / time.Since(began).Seconds()
	// The bucket's burst of 128 KiB may be full at the start and empty at the end.
	if bits > 16e6+8*131072/3 || bits < 8e6 {
		t.Errorf("%.2f Mbit/s pass, the rate is 16", bits/1e6)
	}
	if n.get("slow-1").dropped("rate")+n.get("slow-2").dropped("rate") == 0 {
		t.Error("nothing was dropped for the rate")
	}
	// The flow log tells of every packet at most once.
	var passed, dropped int
	for line := range strings.Lines(n.must("flows", "slow-1", "-o", "json")) {
		var e struct {
			Flow struct{ Verdict, Packets string }
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("flows: %v: %s", err, line)
		}
		if e.Flow.Verdict == "allow" {
			passed += number(e.Flow.Packets)
		} else {
			dropped += number(e.Flow.Packets)
		}
	}
	rec := n.get("slow-1")
	if most := number(rec.Network.EgressPackets); passed == 0 || passed > most {
		t.Errorf("the flow log tells of %d packets that passed, %d were counted", passed, most)
	}
	if most := rec.dropped("rate"); dropped == 0 || dropped > most {
		t.Errorf("the flow log tells of %d packets that were dropped, %d were counted", dropped, most)
	}
}

// TestAudit: in audit mode what no rule allows passes inside the guardrails of
// the tenants above, is recorded, and comes out as a policy that allows it.
func TestAudit(t *testing.T) {
	n := open(t)
	box := n.start("watched", "watched/team", python)
	if got := n.fetch("watched", "http://api.example.com/", "http://"+rig.API4.String()+"/"); !strings.Contains(got[0], "hello") || !strings.Contains(got[1], "hello") {
		t.Errorf("in audit mode: %q", got)
	}
	// Outside the guardrail of the tenant above, and where no policy leads.
	for _, target := range []string{rig.Forbidden4.String() + ":80", rig.Metadata4.String() + ":80"} {
		if reached, err := rig.DialFrom(box.Sandbox.Pid, target, 300*time.Millisecond); err != nil || reached {
			t.Errorf("%s is reached: %t, %v", target, reached, err)
		}
	}
	if out := n.must("explain", "watched", rig.API4.String()+":80"); !strings.Contains(out, "audit") {
		t.Errorf("explain says:\n%s", out)
	}
	if out := n.must("policy", "status", "watched"); !strings.Contains(out, "audit") || !strings.Contains(out, rig.API4.String()) {
		t.Errorf("policy status:\n%s", out)
	}
	eventually(t, "the flow log has it", func() bool { return strings.Contains(n.must("flows", "watched", "--audit"), "api.example.com") })
	draft := n.must("policy", "suggest", "watched")
	if !strings.Contains(draft, `fqdn: "api.example.com"`) || !strings.Contains(draft, "80/tcp") {
		t.Fatalf("suggested:\n%s", draft)
	}
	if strings.Contains(draft, rig.Forbidden4.String()) {
		t.Errorf("suggested what did not pass:\n%s", draft)
	}
}

// TestPublish: a published port of the node leads to the sandbox and nowhere
// else; the answers leave, and nothing that is not an answer.
func TestPublish(t *testing.T) {
	n := open(t)
	const serve = `
import http.server
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(s): s.send_response(200); s.end_headers(); s.wfile.write(b"from inside")
    def log_message(*a): pass
http.server.ThreadingHTTPServer(("", 8000), H).serve_forever()
`
	n.refuse(1, []string{"publish"}, "run", "-d", "--publish", "22:8000", "--tenant", "globex", "--cpus", "100m", "--memory", "32MiB", python, "true")
	own, err := net.Listen("tcp", ":30999") // a service of the node
	if err != nil {
		t.Fatal(err)
	}
	n.refuse(1, []string{"30999", "service of the node"}, "run", "-d", "--publish", "30999:8000", "--tenant", "globex", "--cpus", "100m", "--memory", "32MiB", python, "true")
	own.Close()
	n.must("run", "-d", "--name", "web", "--tenant", "acme", "--cpus", "500m", "--memory", "64MiB", "--publish", "30080:8000", python, "python3", "-c", serve)
	n.refuse(1, []string{"30080", "another tenant"}, "run", "-d", "--publish", "30080:8000", "--tenant", "globex", "--cpus", "100m", "--memory", "32MiB", python, "true")
	box := n.get("web")
	ask := func() string {
		var got string
		// As the far host, which no rule of the sandbox allows.
		err := n.Net.Inside("far", func() error {
			c, err := net.DialTimeout("tcp", "198.51.100.1:30080", time.Second)
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(2 * time.Second))
			fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
			buf := make([]byte, 4096)
			for {
				k, err := c.Read(buf)
				got += string(buf[:k])
				if err != nil {
					return nil
				}
			}
		})
		if err != nil {
			return err.Error()
		}
		return got
	}
	eventually(t, "the published port answers", func() bool { return strings.Contains(ask(), "from inside") })
	// The sandbox itself may not begin anything there, from that port neither.
	if reached, err := rig.DialFrom(box.Sandbox.Pid, rig.Forbidden4.String()+":80", 300*time.Millisecond); err != nil || reached {
		t.Errorf("the far host is reached from inside: %t, %v", reached, err)
	}
	if err := n.KillAgent(); err != nil {
		t.Fatal(err)
	}
	if got := ask(); !strings.Contains(got, "from inside") {
		t.Errorf("with no agent: %q", got)
	}
	if err := n.StartAgent(); err != nil {
		t.Fatal(err)
	}
	if got := ask(); !strings.Contains(got, "from inside") {
		t.Errorf("after a restart of the agent: %q", got)
	}
	var status struct {
		Rules []struct{ Rule, Packets string }
	}
	if err := json.Unmarshal([]byte(n.must("policy", "status", "-o", "json", "web")), &status); err != nil {
		t.Fatal(err)
	}
	counted := false
	for _, r := range status.Rules {
		counted = counted || strings.HasPrefix(r.Rule, "published") && number(r.Packets) > 0
	}
	if !counted {
		t.Errorf("the answers are counted under no rule: %+v", status.Rules)
	}
	n.must("rm", "-f", "web")
	if got := ask(); strings.Contains(got, "from inside") {
		t.Error("the port answers after its sandbox has gone")
	}
}
