// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/test/rig"
)

// totals by meter.
type totals map[string]uint64

// usage answers the totals of a sandbox, of the node or of the gateway.
func (n *node) usage(id string, fromGateway bool) totals {
	n.t.Helper()
	args := []string{"usage", "-o", "json", "--sandbox", id}
	if fromGateway {
		args = append(args, "--gateway", n.Gateway)
	}
	out := totals{}
	for line := range strings.Lines(n.must(args...)) {
		var row struct {
			Meter string `json:"meter"`
			Total string `json:"total"`
		}
		if err := json.Unmarshal([]byte(line), &row); err != nil {
			n.t.Fatalf("usage: %v: %s", err, line)
		}
		v, err := strconv.ParseUint(row.Total, 10, 64)
		if err != nil {
			n.t.Fatalf("usage: %v: %s", err, line)
		}
		out[row.Meter] += v
	}
	return out
}

// spool is the part of `bulkhead node` about usage.
type spool struct {
	First string `json:"first_seq"`
	Last  string `json:"last_seq"`
	Acked string `json:"acked_seq"`
	Bytes string `json:"bytes"`
	State string `json:"state"`
	Error string `json:"last_error"`
}

func (s spool) waiting() int { return number(s.Last) - number(s.Acked) }

func (n *node) spool() spool {
	n.t.Helper()
	var info struct {
		Spool spool `json:"spool"`
	}
	out := n.must("node", "-o", "json")
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		n.t.Fatalf("node: %v: %s", err, out)
	}
	return info.Spool
}

// checkBill asserts that node and gateway say the same of a stopped sandbox,
// and that its bytes are those of a capture.
func (n *node) checkBill(id string, wire rig.Counted) {
	n.t.Helper()
	own := n.usage(id, false)
	if len(own) != 6 || own["wall_ms"] == 0 || own["cpu_ns"] == 0 || own["mem_mib_ms"] == 0 {
		n.t.Errorf("the node's usage is %v", own)
	}
	if own["egress_bytes"] != wire.Sent || own["ingress_bytes"] != wire.Received {
		n.t.Errorf("metered %d bytes out and %d in, the capture has %d and %d", own["egress_bytes"], own["ingress_bytes"], wire.Sent, wire.Received)
	}
	var ledger totals
	for range 100 {
		if ledger = n.usage(id, true); fmt.Sprint(ledger) == fmt.Sprint(own) {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	n.t.Errorf("the ledger has %v, the node %v", ledger, own)
}

// TestBillEqualsWire: the bytes billed are the bytes that a capture on the far
// side of the program counts, to the byte.
func TestBillEqualsWire(t *testing.T) {
	n := open(t)
	const upload = `
import socket, sys
host, total = sys.argv[1], int(sys.argv[2])
s = socket.create_connection((host, 80))
s.sendall(b"POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % total)
chunk = b"x" * (1 << 20)
while total > 0:
    s.sendall(chunk[:min(total, len(chunk))]); total -= len(chunk)
print(s.recv(4096).decode())
`
	const download = `
import socket
s = socket.create_connection(("203.0.113.10", 5002))
s.sendall(b"50000000\n")
got = 0
while True:
    b = s.recv(1 << 20)
    if not b: break
    got += len(b)
print(got)
`
	const datagrams = `
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
for i in range(2000):
    s.sendto(b"", ("203.0.113.10", 5353))
    s.sendto(b"x" * (i % 1400), ("203.0.113.10", 5353))
    s6.sendto(b"y", ("2001:db8:113::10", 5353))
    s.sendto(b"denied", ("203.0.113.10", 5354))
print("sent")
`
	if err := n.Net.Inside("api", func() error {
		c, err := net.ListenPacket("udp", ":5353")
		if err != nil {
			return err
		}
		t.Cleanup(func() { c.Close() })
		go (&listener{heard: map[string]bool{}}).serve(c)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, want string
		min        uint64
		args       []string
	}{
		{"upload", "50000000 bytes received", 50_000_000, []string{upload, rig.API4.String(), "50000000"}},
		{"upload6", "50000000 bytes received", 50_000_000, []string{upload, rig.API6.String(), "50000000"}},
		{"download", "50000000", 0, []string{download}},
		{"datagrams", "sent", 2000*28 + 2000*28 + 2000*49, []string{datagrams}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := open(t)
			rec := n.start(c.name, "acme", python, "--cpus", "1", "--memory", "128MiB")
			capture, err := rig.OpenCapture(rig.LinkPrefix+rec.Sandbox.ID, func(a netip.Addr) bool { return a == rig.API4 || a == rig.API6 })
			if err != nil {
				t.Fatal(err)
			}
			r := n.do(append([]string{"exec", c.name, "python3", "-c"}, c.args...)...)
			if !strings.Contains(r.out, c.want) {
				t.Errorf("got %s", r)
			}
			denied := n.get(c.name).dropped("no_rule")
			time.Sleep(300 * time.Millisecond) // the last acknowledgements
			wire, err := capture.Stop()
			if err != nil {
				t.Fatal(err)
			}
			if c.name == "datagrams" {
				// The capture sees what the program has dropped as well: the
				// program runs behind it. 28 bytes of header, 6 of text.
				if denied != 2000 {
					t.Errorf("%d datagrams were denied, want 2000", denied)
				}
				wire.Sent -= uint64(denied) * (28 + 6)
			}
			if wire.Sent < c.min {
				t.Errorf("the capture has %d bytes, want %d at least", wire.Sent, c.min)
			}
			n.must("stop", c.name)
			n.checkBill(rec.Sandbox.ID, wire)
		})
	}
}

// TestGatewayAway: the node goes on, says so, and delivers everything exactly
// once when the gateway is back.
func TestGatewayAway(t *testing.T) {
	n := open(t)
	eventually(t, "the gateway has everything", func() bool { return n.spool().waiting() == 0 })
	t.Cleanup(func() {
		if err := n.KillGateway(); err != nil {
			t.Error(err)
		}
		if err := n.StartGateway(); err != nil {
			t.Error(err)
		}
	})
	if err := n.KillGateway(); err != nil {
		t.Fatal(err)
	}
	n.must("run", "--name", "unseen", "--tenant", "acme", "--cpus", "1", python, "python3", "-c", "for i in range(3000000): pass")
	id := n.get("unseen").Sandbox.ID
	eventually(t, "the node says that its gateway is away and usage waits", func() bool {
		s := n.spool()
		return s.State == "disconnected" && s.waiting() >= 6 && s.Error != ""
	})
	if out := n.must("node"); !strings.Contains(out, "disconnected") || !strings.Contains(out, "records waiting") {
		t.Errorf("node says:\n%s", out)
	}
	for range 3 { // the gateway dies again while it takes them
		if err := n.StartGateway(); err != nil {
			t.Fatal(err)
		}
		if err := n.KillGateway(); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.StopAgent(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartAgent(); err != nil { // and the agent knows what it owes
		t.Fatal(err)
	}
	if err := n.StartGateway(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "everything has arrived", func() bool { s := n.spool(); return s.State == "connected" && s.waiting() == 0 })
	n.checkBill(id, rig.Counted{})
}

// TestSpoolBound: at its bound nothing new starts, and the refusal says why;
// what runs goes on; all of it is billed once there is room.
func TestSpoolBound(t *testing.T) {
	n := open(t)
	restart := func(extra, interval string) {
		t.Helper()
		if err := n.StopAgent(); err != nil {
			t.Fatal(err)
		}
		n.Reconfigure(func(c *rig.Config) { c.Extra, c.Interval = extra, interval })
		if err := n.StartAgent(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the gateway has everything", func() bool { return n.spool().waiting() == 0 })
	restart(`spool_limit = "1MiB"`, "100ms")
	defer restart("", "1s")
	var ids []string
	for i := range 12 {
		ids = append(ids, n.start(fmt.Sprintf("s%d", i), "acme", busybox).Sandbox.ID)
	}
	if err := n.KillGateway(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.StartGateway(); err != nil {
			t.Error(err)
		}
		eventually(t, "the spool is empty", func() bool { return n.spool().waiting() == 0 })
	}()
	for range 400 {
		if n.spool().State == "full" {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	n.refuse(1, []string{"metered", "spool", "1048576", "gateway"}, "run", "--name", "refused", "--tenant", "acme", busybox, "true")
	if got := n.must("ls", "-aq"); len(strings.Fields(got)) != len(ids) {
		t.Errorf("a refused sandbox left something: %s", got)
	}
	if r := n.do("exec", "s0", "echo", "alive"); r.out != "alive\n" {
		t.Errorf("what runs does not go on: %s", r)
	}
	if out := n.must("node"); !strings.Contains(out, "no sandbox can start") {
		t.Errorf("node does not say it:\n%s", out)
	}
	if err := n.StartGateway(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "sandboxes start again", func() bool {
		return n.do("run", "--rm", "--tenant", "acme", busybox, "true").code == 0
	})
	for i, id := range ids {
		n.must("stop", fmt.Sprintf("s%d", i))
		n.checkBill(id, rig.Counted{})
	}
}
