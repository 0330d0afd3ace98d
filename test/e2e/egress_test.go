// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/rig"
)

// flow is one thing that a sandbox tries, and what must come of it.
type flow struct {
	proto, addr string
	port        int
	allowed     bool
	reason      string // of explain
}

func (f flow) String() string { return f.proto + " " + net.JoinHostPort(f.addr, fmt.Sprint(f.port)) }

// tryAll tries flows at once: TCP by connecting, where a refusal of the other
// end is as good as an answer, UDP by sending the flow's number.
const tryAll = `
import json, socket, sys, threading
flows = json.load(sys.stdin)
out = [None] * len(flows)
def attempt(i, proto, addr, port):
    family = socket.AF_INET6 if ":" in addr else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM)
    s.settimeout(1.5)
    try:
        if proto == "udp":
            if addr == "255.255.255.255": s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            for _ in range(3): s.sendto(b"flow %d" % i, (addr, port))
            out[i] = "sent"
        else:
            s.connect((addr, port)); out[i] = "reached"
    except ConnectionRefusedError: out[i] = "reached"
    except Exception as e: out[i] = type(e).__name__
    s.close()
threads = [threading.Thread(target=attempt, args=(i, *f)) for i, f in enumerate(flows)]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps(out))
`

// listener notes which UDP flows arrive somewhere.
type listener struct {
	mu    sync.Mutex
	heard map[string]bool
}

func (l *listener) serve(c net.PacketConn) {
	buf := make([]byte, 2048)
	for {
		k, _, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		l.mu.Lock()
		l.heard[string(buf[:k])] = true
		l.mu.Unlock()
	}
}

// TestExplainIsWhatHappens: for every flow the answer of explain, the answer of
// the network and the expectation are the same.
func TestExplainIsWhatHappens(t *testing.T) {
	n := open(t)
	other := n.start("neighbour", "acme", python)
	n.start("box", "acme", python)
	host, err := net.Listen("tcp", ":0") // a service of the host, on all its addresses
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	hostPort := host.Addr().(*net.TCPAddr).Port
	accepted := make(chan string, 100)
	go func() {
		for {
			c, err := host.Accept()
			if err != nil {
				return
			}
			accepted <- c.LocalAddr().String()
			c.Close()
		}
	}()
	flows := []flow{
		{"tcp", rig.API4.String(), 80, true, "allow"},
		{"tcp", rig.API4.String(), 443, true, "allow"},
		{"tcp", rig.API4.String(), 22, false, "no_rule"},
		{"tcp", rig.API4.String(), 5001, true, "allow"},
		{"tcp", rig.API4.String(), 5010, true, "allow"},
		{"tcp", rig.API4.String(), 4999, false, "no_rule"},
		{"tcp", rig.API4.String(), 5011, false, "no_rule"},
		{"tcp", rig.API4.String(), 5005, false, "rule_deny"},
		{"tcp", rig.API6.String(), 80, true, "allow"},
		{"tcp", rig.API6.String(), 5001, false, "no_rule"},
		{"tcp", rig.Forbidden4.String(), 80, false, "no_rule"},
		{"tcp", rig.Forbidden6.String(), 80, false, "no_rule"},
		{"tcp", rig.Metadata4.String(), 80, false, "metadata"},
		{"tcp", "fd00:ec2::254", 80, false, "metadata"},
		{"tcp", "169.254.1.1", hostPort, false, "link_local"},
		{"tcp", "203.0.113.1", hostPort, false, "host"},
		{"tcp", "203.0.113.1", 80, false, "host"},
		{"tcp", "2001:db8:113::1", hostPort, false, "host"},
		{"tcp", other.Sandbox.Addresses[0], 80, false, "sandbox"},
		{"tcp", other.Sandbox.Addresses[1], 80, false, "sandbox"},
		{"tcp", "100.127.15.1", 80, false, "sandbox"},
		{"udp", rig.API4.String(), 5353, true, "allow"},
		{"udp", rig.API4.String(), 5354, false, "no_rule"},
		{"udp", rig.API4.String(), 80, false, "no_rule"},
		{"udp", rig.API6.String(), 5353, true, "allow"},
		{"udp", rig.API6.String(), 5354, false, "no_rule"},
		{"udp", rig.Forbidden4.String(), 5353, false, "no_rule"},
		{"udp", "203.0.113.1", 5353, false, "host"},
		{"udp", "224.0.0.251", 5353, false, "multicast"},
		{"udp", "255.255.255.255", 5353, false, "broadcast"},
		{"udp", "169.254.169.254", 53, false, "metadata"},
	}
	for _, a := range hostAddrs(t) {
		flows = append(flows, flow{"tcp", a.String(), hostPort, false, "host"})
	}

	heard := &listener{heard: map[string]bool{}}
	listen := func(addr string) error {
		c, err := net.ListenPacket("udp", addr)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			go heard.serve(c)
		}
		return err
	}
	for _, h := range []string{"api", "far"} {
		for _, port := range []string{":5353", ":5354", ":80"} {
			if err := n.Net.Inside(h, func() error { return listen(port) }); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := rig.Enter(other.Sandbox.Pid, func() error { return listen(":5353") }); err != nil {
		t.Fatal(err)
	}
	if err := listen("203.0.113.1:5353"); err != nil {
		t.Fatal(err)
	}

	before := n.get("box").Network
	for i, f := range flows {
		var x struct {
			Allowed bool   `json:"allowed"`
			Reason  string `json:"reason"`
		}
		out := n.must("explain", "-o", "json", "box", f.proto, net.JoinHostPort(f.addr, fmt.Sprint(f.port)))
		if err := json.Unmarshal([]byte(out), &x); err != nil {
			t.Fatalf("explain: %v: %s", err, out)
		}
		if x.Allowed != f.allowed || x.Reason != f.reason {
			t.Errorf("explain %s: got %t %s, want %t %s", flows[i], x.Allowed, x.Reason, f.allowed, f.reason)
		}
	}
	if after := n.get("box").Network; after != before {
		t.Errorf("explain was counted: %+v before, %+v after", before, after)
	}

	var args [][]any
	for _, f := range flows {
		args = append(args, []any{f.proto, f.addr, f.port})
	}
	in, _ := json.Marshal(args)
	r := n.feed(strings.NewReader(string(in)), "exec", "-i", "box", "python3", "-c", tryAll)
	var got []string
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || len(got) != len(flows) {
		t.Fatalf("try: %s", r)
	}
	time.Sleep(200 * time.Millisecond)
	heard.mu.Lock()
	defer heard.mu.Unlock()
	for i, f := range flows {
		reached := got[i] == "reached"
		if f.proto == "udp" {
			reached = heard.heard[fmt.Sprintf("flow %d", i)]
		}
		if reached != f.allowed {
			t.Errorf("%s: reached %t (%s), want %t", f, reached, got[i], f.allowed)
		}
	}
	if len(accepted) > 0 {
		t.Errorf("a service of the host was reached at %s", <-accepted)
	}
	if n.Net.Requests("far") != 0 || n.Net.Requests("meta") != 0 {
		t.Errorf("the forbidden host saw %d requests, metadata %d", n.Net.Requests("far"), n.Net.Requests("meta"))
	}
	rec := n.get("box")
	for reason, min := range map[string]int{"no_rule": 8, "rule_deny": 1, "metadata": 3, "host": 3, "sandbox": 3, "link_local": 1, "multicast": 1, "broadcast": 1} {
		if d := rec.dropped(reason); d < min {
			t.Errorf("%d packets dropped for %s, want %d at least: %+v", d, reason, min, rec.Drops)
		}
	}
}

// hostAddrs answers the host's own addresses that could be reached.
func hostAddrs(t *testing.T) []netip.Addr {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var out []netip.Addr
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err == nil && p.Addr().IsGlobalUnicast() && !p.Addr().IsLinkLocalUnicast() {
			out = append(out, p.Addr())
		}
	}
	return out
}

// TestOwnPolicyOfASandbox: it may narrow and widen only within the guardrail,
// and an ancestor's deny wins.
func TestOwnPolicyOfASandbox(t *testing.T) {
	n := open(t)
	dir := t.TempDir()
	own := filepath.Join(dir, "own.yaml")
	write(t, own, `kind: EgressPolicy
name: own
rules:
- name: ssh
  action: allow
  to: [{cidr: 203.0.113.10/32}]
  ports: [22/tcp, 5005/tcp]
- name: no-http
  action: deny
  to: [{cidr: 203.0.113.10/32}]
  ports: [80/tcp]
`)
	n.start("own", "acme", busybox, "--policy", own)
	for q, want := range map[string]string{
		"203.0.113.10:22":   "ALLOW",
		"203.0.113.10:80":   "DENY",
		"203.0.113.10:443":  "ALLOW",
		"203.0.113.10:5005": "DENY",
	} {
		if out := n.must("explain", "own", "tcp", q); !strings.HasPrefix(out, want) {
			t.Errorf("explain %s: %s, want %s", q, out, want)
		}
	}
	write(t, own, "kind: EgressPolicy\nname: own\nrules:\n- name: x\n  action: allow\n  too: [{cidr: 1.2.3.4/32}]\n  ports: [1/tcp]\n")
	r := n.do("run", "--tenant", "acme", "--policy", own, busybox, "true")
	if r.code == 0 || !strings.Contains(r.err, ":6") || !strings.Contains(r.err, `"to"`) {
		t.Errorf("a policy with an unknown key: %s", r)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// pump sends lines over one TCP connection for ever.
const pump = `
import socket, time
s = socket.create_connection(("203.0.113.10", 5001))
while True:
    s.sendall(b"x" * 100)
    time.sleep(0.02)
`

// TestReloadCutsALiveFlow: a rule that goes takes effect at the next packet of
// a connection that is open, and explain says the same before and after.
func TestReloadCutsALiveFlow(t *testing.T) {
	n := open(t)
	n.must("run", "-d", "--name", "pump", "--tenant", "acme", python, "python3", "-c", pump)
	moves := func() bool {
		start := n.Net.Received.Load()
		time.Sleep(400 * time.Millisecond)
		return n.Net.Received.Load() > start
	}
	eventually(t, "the pump sends", moves)
	explain := func() string {
		word, _, _ := strings.Cut(n.must("explain", "pump", "tcp", "203.0.113.10:5001"), " ")
		return strings.Fields(word)[0]
	}
	if got := explain(); got != "ALLOW" {
		t.Errorf("explain before: %s", got)
	}
	file := filepath.Join(n.TenantsDir, "acme.yaml")
	old, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { write(t, file, string(old)); n.must("reload") })
	write(t, file, strings.Replace(string(old), "5000-5010/tcp", "6000-6010/tcp", 1))
	out := n.must("reload")
	if !strings.Contains(out, "1") {
		t.Errorf("reload says %q", out)
	}
	before := n.Net.Received.Load()
	time.Sleep(time.Second)
	if got := n.Net.Received.Load() - before; got > 0 {
		t.Errorf("%d bytes arrived after the rule had gone", got)
	}
	if got := explain(); got != "DENY" {
		t.Errorf("explain after: %s", got)
	}
	rec := n.get("pump")
	if rec.dropped("no_rule") == 0 || rec.Sandbox.PolicyRev != "2" || !strings.Contains(rec.kinds(), "policy") {
		t.Errorf("after the reload: revision %s, drops %+v, events %s", rec.Sandbox.PolicyRev, rec.Drops, rec.kinds())
	}
	write(t, file, string(old))
	n.must("reload")
	eventually(t, "the same connection goes on once it is allowed again", moves)
}

// TestForgedFrames: what a sandbox cannot send for want of a raw socket is
// dropped also when something sends it.
func TestForgedFrames(t *testing.T) {
	n := open(t)
	box := n.start("box", "acme", busybox)
	mac := hardwareAddr(t, box.Sandbox.Pid)
	src4, src6 := netip.MustParseAddr(box.Sandbox.Addresses[0]), netip.MustParseAddr(box.Sandbox.Addresses[1])
	other4 := netip.MustParseAddr("100.127.9.9")
	gw := net.HardwareAddr{0x02, 0x62, 0x69, 0, 0, 1}
	good := frame{dst: gw, src: mac, from: src4, to: rig.API4, port: 5353, proto: unix.IPPROTO_UDP}
	v6 := good.with(func(f *frame) { f.from, f.to = src6, rig.API6 })
	for _, c := range []struct {
		reason string
		frame  []byte
	}{
		{"spoof_ip", good.with(func(f *frame) { f.from = other4 }).bytes()},
		{"spoof_ip", good.with(func(f *frame) { f.from = rig.API4 }).bytes()},
		{"spoof_ip", v6.with(func(f *frame) { f.from = rig.Forbidden6 }).bytes()},
		{"spoof_mac", good.with(func(f *frame) { f.src = net.HardwareAddr{2, 0, 0, 0, 0, 1} }).bytes()},
		{"fragment", good.with(func(f *frame) { f.fragment = true }).bytes()},
		{"vlan", good.with(func(f *frame) { f.vlan = true }).bytes()},
		{"arp", good.with(func(f *frame) { f.ethertype = 0x0806 }).bytes()},
		{"ethertype", good.with(func(f *frame) { f.ethertype = 0x88cc }).bytes()},
		{"icmp", good.with(func(f *frame) { f.proto = 1 }).bytes()},
		{"icmp6", v6.with(func(f *frame) { f.proto = 58 }).bytes()},
		{"ext_header", v6.with(func(f *frame) { f.proto = 0 }).bytes()},
		{"protocol", good.with(func(f *frame) { f.proto = 47 }).bytes()},
		{"no_rule", good.with(func(f *frame) { f.port = 9 }).bytes()},
	} {
		before := n.get("box")
		if err := inject(box.Sandbox.Pid, c.frame); err != nil {
			t.Fatalf("%s: %v", c.reason, err)
		}
		after := n.get("box")
		if after.dropped(c.reason) != before.dropped(c.reason)+1 {
			t.Errorf("%s: %d before, %d after: %+v", c.reason, before.dropped(c.reason), after.dropped(c.reason), after.Drops)
		}
		if after.Network.EgressPackets != before.Network.EgressPackets {
			t.Errorf("%s: the forged frame was let out", c.reason)
		}
	}
	before := n.get("box")
	if err := inject(box.Sandbox.Pid, good.bytes()); err != nil {
		t.Fatal(err)
	}
	if after := n.get("box"); number(after.Network.EgressPackets) != number(before.Network.EgressPackets)+1 {
		t.Errorf("an honest frame was not let out: %+v", after.Drops)
	}
}
