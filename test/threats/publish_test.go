// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/link"
)

// A published port lets the outside in, and answers out. It is no way out by
// itself: not to others, not from another port, not for a neighbour.
func TestPublishedPort(t *testing.T) {
	n := theWorld(t)
	const port, hostPort = 8080, 30080
	p, err := netpol.WithPublished(compile(t, ""), "acme", []netpol.PortRange{{Lo: port, Hi: port, Proto: netpol.TCP}, {Lo: port, Hi: port, Proto: netpol.UDP}})
	must(t, err)
	b, neighbour := n.launch(t, p), n.sandbox(t, allowAll)
	must(t, n.links.Publish(b.id, []link.Port{{Host: hostPort, Sandbox: port, Proto: protoTCP}, {Host: hostPort, Sandbox: port, Proto: protoUDP}}))
	serveEchoIn(t, b.ns, netip.AddrPortFrom(b.addr4, port))

	var c net.Conn
	must(t, in(n.far, func() (err error) {
		c, err = net.DialTimeout("tcp", netip.AddrPortFrom(host4, hostPort).String(), patience)
		return err
	}))
	t.Cleanup(func() { _ = c.Close() })
	if err := ping(c, patience); err != nil {
		t.Fatalf("control: the published port does not answer: %v", err)
	}
	visitor := c.LocalAddr().(*net.TCPAddr).AddrPort()
	b.repel(t,
		attack{"to another host", "no_rule", one(packet{dst: other4, flags: 16, sport: port, port: visitor.Port()}), false},
		attack{"to another port of the visitor", "no_rule", one(packet{dst: far4, flags: 16, sport: port, port: visitor.Port() ^ 1}), false},
		attack{"from another port", "no_rule", one(packet{dst: far4, flags: 16, sport: port + 1, port: visitor.Port()}), false},
		attack{"by UDP", "no_rule", one(packet{dst: far4, sport: port, port: visitor.Port()}), false},
		attack{"a connection of its own", "no_rule", one(packet{dst: other4, syn: true, sport: port, port: 443}), false},
	)
	// A neighbour cannot pretend to be a visitor, nor come by the host's port.
	neighbour.repel(t,
		attack{"the neighbour, directly", "sandbox", one(packet{dst: b.addr4, syn: true, port: port}), true},
		attack{"the neighbour, by the host", "host", one(packet{dst: host4, syn: true, port: hostPort}), true},
	)
	// No longer published: cut with the next packet.
	if err := ping(c, patience); err != nil {
		t.Errorf("control: the connection broke early: %v", err)
	}
	must(t, errors.Join(n.links.Publish(b.id, nil)))
	b.setPolicy(t, compile(t, ""), 2)
	if err := ping(c, refused); err == nil {
		t.Error("the connection goes on after its port is no longer published")
	}
}

// The verdict on a destination is remembered. A hard deny that comes later
// counts at once.
func TestHostAddressThatAppears(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, openRule)
	p := packet{dst: other4, port: 7777}
	for range 20 {
		arrives(t, n, b, p)
	}
	local, err := link.HostAddrs()
	must(t, err)
	must(t, n.enforce.SetHostAddrs(append(local, netip.PrefixFrom(other4, 32))))
	t.Cleanup(func() { must(t, n.enforce.SetHostAddrs(local)) })
	b.repel(t, attack{"an address that has become the host's", "host", one(p), false})
	must(t, n.enforce.SetHostAddrs(local))
	arrives(t, n, b, p)
}

// Audit lets pass what no rule allows, and nothing that no rule could.
func TestAuditKeepsHardDenies(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, "mode: audit\n")
	arrives(t, n, b, packet{dst: other4, port: 7777})
	b.repel(t,
		attack{"metadata", "metadata", one(packet{dst: metadata4, port: 80, syn: true}), false},
		attack{"metadata, IPv6", "metadata", one(packet{dst: metadata6, port: 80, syn: true}), false},
		attack{"host_networks", "host_network", one(packet{dst: oob4}), false},
		attack{"management", "link_local", one(packet{dst: bmc4}), false},
		attack{"options", "ip_options", one(packet{dst: other4, options: []byte{1, 1, 1, 1}}), false},
		attack{"another's address", "spoof_ip", one(packet{dst: other4, src: n.open2.addr4}), false},
		attack{"ICMP", "icmp", one(packet{dst: other4, proto: protoICMP, l4: []byte{0, 0, 0, 0, 0, 0, 0, 0}}), false},
	)
}

// A slot that goes to another sandbox brings nothing along.
func TestNextHolderOfASlot(t *testing.T) {
	n := theWorld(t)
	l, sb := n.plan(t, compile(t, openRule))
	p := packet{dst: other4, port: 7777}
	t.Run("first", func(t *testing.T) {
		arrives(t, n, n.launchAs(t, l, sb), p)
	})
	l.ID, sb.ID = "another"+l.ID[7:], "another"+l.ID[7:]
	sb.Program = compile(t, "")
	b := n.launchAs(t, l, sb)
	b.repel(t, attack{"by the last holder's policy", "no_rule", one(p), false})
}
