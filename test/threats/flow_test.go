// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// setPolicy puts another policy over the sandbox's.
func (b *box) setPolicy(t testing.TB, p netpol.Program, rev uint64) {
	t.Helper()
	must(t, b.node.enforce.SetPolicy(b.id, b.slot, p, rev, nil))
}

// flows counts what the host's connection tracker holds from src.
func flows(t testing.TB, src netip.Addr) (count int) {
	t.Helper()
	return flowsThat(t, src, func(*netlink.ConntrackFlow) bool { return true })
}

// From enum tcp_conntrack.
const (
	finWait    = 4
	closeState = 8
)

// closed are the states of TCP in which the kernel gives a flow up for a new
// one when its table is full: FIN_WAIT to CLOSE.
func closed(f *netlink.ConntrackFlow) bool {
	tcp, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP)
	return ok && tcp.State >= finWait && tcp.State <= closeState
}

func flowsThat(t testing.TB, src netip.Addr, match func(*netlink.ConntrackFlow) bool) (count int) {
	t.Helper()
	family := netlink.InetFamily(netlink.FAMILY_V4)
	if src.Is6() {
		family = netlink.FAMILY_V6
	}
	all, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
	must(t, err)
	for _, f := range all {
		if a, ok := netip.AddrFromSlice(f.Forward.SrcIP); ok && a.Unmap() == src && match(f) {
			count++
		}
	}
	return count
}

func tracked(t testing.TB, src netip.Addr) bool { return flows(t, src) > 0 }

// A flow in a neighbour's name would let answers, and then more, through to it.
func TestConntrackPoisoning(t *testing.T) {
	n := theWorld(t)
	b, victim := n.sandbox(t, allowAll), n.sandbox(t, "")
	n.hearFrames(t, n.open2.ns, "eth0", 3)
	n.hearFrames(t, victim.ns, "eth0", 3)
	for _, dst := range []netip.Addr{far4, far6} {
		v6 := dst.Is6()
		of := func(from *box) *box {
			if from == n.open {
				return n.open2
			}
			return victim
		}
		poison := func(from *box, k token) [][]byte {
			return one(packet{dst: dst, src: of(from).addr(v6), port: 7000})(from, k)
		}
		b.repel(t, attack{"in a neighbour's name", "spoof_ip", poison, false})
		if !tracked(t, n.open2.addr(v6)) {
			t.Errorf("control: no flow in the neighbour's name to %s", dst)
		}
		if tracked(t, victim.addr(v6)) {
			t.Errorf("the tracker holds a flow in the victim's name to %s", dst)
		}
		// What the far end sends back to where the packets came from.
		c := n.hearUDP(t, n.far, dst, 7000)
		back := func(to *box) token {
			k := newToken()
			n.await(k)
			if _, err := c.WriteToUDPAddrPort(k[:], netip.AddrPortFrom(to.addr(v6), 50000)); err != nil {
				t.Fatal(err)
			}
			return k
		}
		k := back(n.open2)
		if n.waitFor(k, 1, patience) == 0 {
			t.Error("control: the answer does not reach the neighbour")
		}
		n.forget(k)
		k = back(victim)
		if n.waitFor(k, 1, 2*settle) != 0 {
			t.Error("an answer that it never asked for reached the victim")
		}
		n.forget(k)
	}
}

// Every packet is judged, those of flows that were allowed to begin too.
func TestFlowAfterRevoke(t *testing.T) {
	n := theWorld(t)
	allow := "- {name: one, action: allow, to: [{cidr: 192.0.2.0/24}, {cidr: '2001:db8::/64'}], ports: [5000/tcp, 5000/udp]}\n"
	for _, dst := range []netip.Addr{far4, far6} {
		b := n.sandbox(t, allow)
		to := netip.AddrPortFrom(dst, 5000)
		serveEcho(t, n, to)
		c, err := b.dial("tcp", to, patience)
		must(t, err)
		t.Cleanup(func() { _ = c.Close() })
		if err := ping(c, patience); err != nil {
			t.Fatalf("control: the flow does not work while it is allowed: %v", err)
		}
		k := newToken()
		n.await(k)
		datagram := one(packet{dst: dst, port: 5000})
		b.send(t, datagram(b, k)...)
		if n.waitFor(k, 1, patience) == 0 {
			t.Fatal("control: UDP does not work while it is allowed")
		}
		n.forget(k)

		b.setPolicy(t, compile(t, ""), 2)
		sent, before := b.sent(t), b.drops(t)
		if err := ping(c, refused); err == nil {
			t.Error("the TCP flow goes on without its rule")
		}
		k = newToken()
		n.await(k)
		b.send(t, datagram(b, k)...)
		if b.dropped(t, "no_rule", before, 2) < 2 {
			t.Errorf("the packets after the change were not dropped: %v", b.drops(t))
		}
		if got := b.sent(t); got != sent {
			t.Errorf("%d packets left after the rule had gone", got-sent)
		}
		if n.waitFor(k, 1, settle) != 0 {
			t.Error("UDP of the revoked flow arrived")
		}
		n.forget(k)
	}
}

// A verdict that was cached for a port must not outlive the policy that it
// came from: each packet here has the same addresses and ports.
func TestSourcePortReuse(t *testing.T) {
	n := theWorld(t)
	allowed := compile(t, "- {name: one, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [5000/udp]}\n")
	denied := compile(t, "- {name: one, action: allow, to: [{cidr: 203.0.113.8/32}], ports: [5000/udp]}\n")
	b := n.launch(t, allowed)
	datagram := one(packet{dst: other4, port: 5000})
	for round := range uint64(200) {
		k := newToken()
		n.await(k)
		before := b.drops(t)
		b.send(t, datagram(b, k)...)
		if round%2 == 0 {
			if n.waitFor(k, 1, patience) == 0 {
				t.Fatalf("control: round %d: an allowed packet did not arrive", round)
			}
			b.setPolicy(t, denied, round+2)
		} else {
			if b.dropped(t, "no_rule", before, 1) != 1 || n.count(k) != 0 {
				t.Fatalf("round %d: a packet passed by the verdict of an earlier policy", round)
			}
			b.setPolicy(t, allowed, round+2)
		}
		n.forget(k)
	}
	// The same with connections, each from the port of the last one.
	serveEcho(t, n, netip.AddrPortFrom(other4, 5000))
	tcp := compile(t, "- {name: one, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [5000/tcp]}\n")
	b.setPolicy(t, tcp, 1000)
	if !b.connects(netip.AddrPortFrom(other4, 5000), patience) {
		t.Error("control: no connection while it is allowed")
	}
	b.setPolicy(t, denied, 1001)
	if b.connects(netip.AddrPortFrom(other4, 5000), refused) {
		t.Error("connected after the rule had gone")
	}
}

// The agent goes; what it enforced and counted stays and goes on.
func TestAgentDies(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, "- {name: one, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [5000/tcp]}\n")
	to := netip.AddrPortFrom(far4, 5000)
	serve(t, n, to, func(c io.ReadWriter) { _, _ = io.Copy(c, c) })
	c, err := b.dial("tcp", to, patience)
	must(t, err)
	defer c.Close()
	must(t, ping(c, patience))
	bad := attack{"a denied address", "no_rule", one(packet{dst: other4}), false}
	b.repel(t, bad)
	sent, dropped := b.sent(t), b.drops(t)["no_rule"]

	must(t, n.enforce.Close())
	must(t, n.links.Close())
	if err := ping(c, patience); err != nil {
		t.Errorf("the live flow stopped with the agent: %v", err)
	}
	n.control(t, bad)
	k := newToken()
	n.await(k)
	defer n.forget(k)
	b.send(t, bad.frames(b, k)...)
	time.Sleep(2 * settle)
	if n.count(k) != 0 {
		t.Error("a denied packet arrived while no agent ran")
	}
	n.restart(t)
	if got := b.sent(t); got <= sent {
		t.Errorf("egress went from %d to %d packets", sent, got)
	}
	if got := b.drops(t)["no_rule"]; got != dropped+1 {
		t.Errorf("drops went from %d to %d, want one more", dropped, got)
	}
	must(t, n.enforce.Verify(b.id, b.slot, b.link))
	b.repel(t, bad)
	if err := ping(c, patience); err != nil {
		t.Errorf("the live flow stopped when the agent came back: %v", err)
	}
}
