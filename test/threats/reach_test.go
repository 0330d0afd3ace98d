// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/link"
)

// Destinations that no policy opens, under one that allows every address.

func TestMetadataServices(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	var attacks []attack
	for _, a := range []string{"169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "fd00:ec2::254"} {
		dst := netip.MustParseAddr(a)
		attacks = append(attacks,
			attack{"SYN to " + a, "metadata", one(packet{dst: dst, syn: true, port: 80}), false},
			attack{"UDP to " + a, "metadata", one(packet{dst: dst, port: 53}), false},
		)
		rule := fmt.Sprintf("kind: EgressPolicy\nname: x\nrules:\n- {name: m, action: allow, to: [{cidr: %s/%d}], ports: [80/tcp]}\n", a, dst.BitLen())
		if _, err := netpol.Parse("x.yaml", []byte(rule)); err == nil {
			t.Errorf("a policy may allow %s by name", a)
		}
	}
	b.repel(t, attacks...)
}

// Translators on the way out turn these into IPv4: what is denied there must be
// denied here.
func TestEmbeddedAddresses(t *testing.T) {
	n := theWorld(t)
	must(t, route(map[string]string{"64:ff9b::/96": far6.String(), "2002::/16": far6.String()}))
	b := n.sandbox(t, allowAll)
	var attacks []attack
	for _, c := range []struct{ v4, reason string }{
		{"169.254.169.254", "metadata"}, {"168.63.129.16", "metadata"}, {"169.254.0.17", "link_local"}, {"127.0.0.1", "loopback"},
		{"192.0.2.1", "host"}, {"198.18.5.5", "host_network"}, {"100.96.0.1", "sandbox"},
	} {
		v4 := netip.MustParseAddr(c.v4).As4()
		nat64 := netip.MustParseAddr("64:ff9b::").As16()
		copy(nat64[12:], v4[:])
		sixToFour := [16]byte{0x20, 2, v4[0], v4[1], v4[2], v4[3], 15: 1}
		attacks = append(attacks,
			attack{"NAT64 of " + c.v4, c.reason, one(packet{dst: netip.AddrFrom16(nat64), port: 80, syn: true}), false},
			attack{"6to4 of " + c.v4, c.reason, one(packet{dst: netip.AddrFrom16(sixToFour), port: 80, syn: true}), false},
		)
	}
	b.repel(t, attacks...)
	arrives(t, n, b, packet{dst: netip.MustParseAddr("64:ff9b::cb00:7107"), port: 443}) // of other4
}

// Management controllers answer on link-local addresses of the host's own
// links; operators have networks of their own.
func TestManagementNetworks(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	b.repel(t,
		attack{"Redfish over the host's USB link", "link_local", one(packet{dst: bmc4, syn: true, port: 443}), false},
		attack{"IPMI", "link_local", one(packet{dst: bmc4, port: 623}), false},
		attack{"host_networks", "host_network", one(packet{dst: oob4, syn: true, port: 443}), false},
	)
}

// hostAddrs answers the addresses that the host itself answers at.
func hostAddrs(t testing.TB) (out []netip.Addr) {
	t.Helper()
	all, err := link.HostAddrs()
	must(t, err)
	for _, p := range all {
		a := p.Addr()
		if p.IsSingleIP() && !a.IsLoopback() && !a.IsLinkLocalUnicast() && !a.IsMulticast() {
			out = append(out, a)
		}
	}
	return out
}

func TestHostServices(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, allowAll)
	const port = 8053
	n.hearUDP(t, 0, netip.IPv4Unspecified(), port)
	n.hearUDP(t, 0, netip.IPv6Unspecified(), port)
	for _, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		serveIn(t, 0, netip.AddrPortFrom(any, port), func(c io.ReadWriter) { _, _ = io.Copy(c, c) })
	}
	var attacks []attack
	seen := map[string]bool{}
	for _, a := range hostAddrs(t) {
		if strings.HasSuffix(a.String(), ".255") || strings.HasSuffix(a.String(), ".0") || strings.HasSuffix(a.String(), "::") {
			continue // broadcast and anycast addresses: no service answers there
		}
		seen[a.String()] = true
		reason := "host"
		if a.IsLinkLocalUnicast() || strings.HasPrefix(a.String(), "169.254.") {
			reason = "link_local"
		}
		attacks = append(attacks, attack{"UDP to " + a.String(), reason, one(packet{dst: a, port: port}), false})
		to := netip.AddrPortFrom(a, port)
		if !n.open.connects(to, patience) {
			t.Errorf("control: no connection to the host at %s", a)
		}
		if b.connects(to, refused) {
			t.Errorf("connected to the host at %s", a)
		}
	}
	for _, a := range []netip.Addr{host4, host6, netip.MustParseAddr("172.17.0.1")} {
		if !seen[a.String()] {
			t.Errorf("%s is not among the host's addresses", a)
		}
	}
	attacks = append(attacks,
		attack{"the management link", "link_local", one(packet{dst: netip.MustParseAddr("169.254.0.18"), port: port}), false},
		attack{"the gateway", "link_local", one(packet{dst: link.Gateway4, port: port}), true},
		attack{"the gateway, IPv6", "link_local", one(packet{dst: link.Gateway6, port: port}), true},
		attack{"127.0.0.1", "loopback", one(packet{dst: netip.MustParseAddr("127.0.0.1"), port: port}), true},
		attack{"0.0.0.0", "unspecified", one(packet{dst: netip.IPv4Unspecified(), port: port}), true},
		attack{"::1", "loopback", one(packet{dst: netip.IPv6Loopback(), port: port}), true},
	)
	b.repel(t, attacks...)
}

func TestSandboxToSandbox(t *testing.T) {
	n := theWorld(t)
	boxes := []*box{n.sandbox(t, allowAll), n.sandbox(t, allowAll), n.sandbox(t, "")}
	n.hearFrames(t, n.open2.ns, "eth0", 3) // every protocol
	for _, b := range boxes {
		n.hearFrames(t, b.ns, "eth0", 3)
	}
	to := func(victim *box, v6, syn bool) func(*box, token) [][]byte {
		return func(b *box, k token) [][]byte {
			target := victim
			if b == n.open {
				target = n.open2
			}
			return one(packet{dst: target.addr(v6), syn: syn, port: 8080})(b, k)
		}
	}
	for i, from := range boxes {
		for j, victim := range boxes {
			if i == j {
				continue
			}
			for _, v6 := range []bool{false, true} {
				name := fmt.Sprintf("%d to %d, IPv6 %v", i, j, v6)
				from.repel(t,
					attack{name + ", UDP", "sandbox", to(victim, v6, false), false},
					attack{name + ", SYN", "sandbox", to(victim, v6, true), false},
				)
			}
		}
	}
	t.Run("the receiver's link", func(t *testing.T) { receiversLink(t, n, boxes[0], boxes[1]) })
}

// receiversLink takes the sender's program and the second layer away: the
// program on the receiver's link stands alone.
func receiversLink(t *testing.T, n *node, from, victim *box) {
	must(t, n.enforce.Detach(from.id, from.slot))
	must(t, n.links.Purge())
	t.Cleanup(func() { n.reopenLinks(t) })
	for _, v6 := range []bool{false, true} {
		k := newToken()
		n.await(k)
		n.open.send(t, one(packet{dst: victim.addr(v6), port: 8080})(n.open, k)...)
		if n.waitFor(k, 1, patience) == 0 {
			t.Errorf("control: the way to the other sandbox is not open")
		}
		n.forget(k)

		k = newToken()
		n.await(k)
		before := victim.drops(t)
		from.send(t, one(packet{dst: victim.addr(v6), port: 8080})(from, k)...)
		if victim.dropped(t, "in_sandbox", before, 1) == 0 {
			t.Errorf("not dropped on the receiver's link: %v", victim.drops(t))
		}
		if n.waitFor(k, 1, settle) != 0 {
			t.Errorf("a packet reached the other sandbox")
		}
		n.forget(k)
	}
}

// reopenLinks puts the second layer back, as a restart of the agent does.
func (n *node) reopenLinks(t testing.TB) {
	t.Helper()
	must(t, n.links.Close())
	m, err := link.Open(linkConfig(n.dir))
	must(t, err)
	n.links = m
}

// ICMP carries whatever one puts into it. A rule may open echo requests, and
// those only small and slowly.
func TestICMPTunnel(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, allowAll)
	var attacks []attack
	for typ := range 256 {
		l4 := append([]byte{byte(typ), 0, 0, 0, 0, 1, 0, 1}, padding...)
		reason4, reason6 := "icmp", "icmp6"
		switch {
		case typ == 8:
			reason4 = "no_rule"
		case typ == 128:
			reason6 = "no_rule"
		case typ >= 130 && typ <= 137 || typ == 143:
			reason6 = "neighbour"
		}
		attacks = append(attacks,
			attack{fmt.Sprintf("ICMP type %d", typ), reason4, one(packet{dst: far4, proto: protoICMP, l4: l4}), false},
			attack{fmt.Sprintf("ICMPv6 type %d", typ), reason6, one(packet{dst: far6, proto: protoICMP6, l4: l4}), false},
		)
	}
	b.repel(t, attacks...)

	ping := n.sandbox(t, "- {name: ping, action: allow, to: [{cidr: 192.0.2.0/24}, {cidr: '2001:db8::/64'}], ports: [echo/icmp]}\n")
	echo := func(dst netip.Addr, size int) packet {
		p := packet{dst: dst, proto: protoICMP, l4: append([]byte{8, 0, 0, 0, 0, 1, 0, 1}, make([]byte, size)...)}
		if dst.Is6() {
			p.proto, p.l4[0] = protoICMP6, 128
		}
		return p
	}
	arrives(t, n, ping, echo(far4, 56))
	arrives(t, n, ping, echo(far6, 56))
	reply, code := echo(far4, 56), echo(far4, 56)
	reply.l4[0], code.l4[1] = 0, 1
	ping.repel(t,
		attack{"echo of 577 bytes", "echo_size", one(echo(far4, 577-20-8-4)), false},
		attack{"IPv6 echo of 577 bytes", "echo_size", one(echo(far6, 577-40-8-4)), false},
		attack{"echo reply", "icmp", one(reply), false},
		attack{"echo with a code", "icmp", one(code), false},
		attack{"echo elsewhere", "no_rule", one(echo(other4, 56)), false},
	)
	// A burst of them: the bucket holds a second's.
	const many = 100
	k := newToken()
	n.await(k)
	defer n.forget(k)
	before := ping.drops(t)
	start := time.Now()
	for range many {
		ping.send(t, one(echo(far4, 500))(ping, k)...)
	}
	allowed := 10 + int(time.Since(start).Seconds()*10) + 1
	ping.pass(t)
	if got := n.count(k); got > allowed {
		t.Errorf("%d of %d echoes arrived, want at most %d", got, many, allowed)
	}
	if ping.dropped(t, "echo_rate", before, 1) == 0 {
		t.Errorf("no echo was dropped for its rate: %v", ping.drops(t))
	}
}

// Tunnels and transports that have no ports.
func TestOtherProtocols(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	known := map[int]string{ // that the parser has an own reason for
		0: "ext_header", 43: "ext_header", 44: "fragment", 50: "ext_header", 51: "ext_header",
		59: "ext_header", 60: "ext_header", 135: "ext_header", 139: "ext_header", 140: "ext_header",
	}
	var attacks []attack
	for proto := range 256 {
		if proto == protoTCP || proto == protoUDP || proto == protoICMP {
			continue
		}
		l4 := append([]byte{0, 0, 0, 0}, padding...)
		reason := "protocol"
		if proto != 0 { // 0 is "unset" in a packet of this test
			attacks = append(attacks, attack{fmt.Sprintf("IPv4 protocol %d", proto), reason, one(packet{dst: far4, proto: byte(proto), l4: l4}), false})
		}
		if r, ok := known[proto]; ok {
			reason = r
		}
		if proto == protoICMP6 || proto == 0 || proto == 43 || proto == 44 || proto == 51 || proto == 60 || proto == 135 {
			continue // read as a header: TestIPv6ExtensionHeaders, TestFragments
		}
		attacks = append(attacks, attack{fmt.Sprintf("IPv6 next header %d", proto), reason, one(packet{dst: far6, proto: byte(proto), l4: l4}), false})
	}
	b.repel(t, attacks...)
	// A tunnel inside UDP needs a rule for its port like all else.
	web := b.node.sandbox(t, "- {name: web, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [443/tcp, 53/udp]}\n")
	web.repel(t,
		attack{"VXLAN", "no_rule", one(packet{dst: far4, port: 4789}), false},
		attack{"Geneve", "no_rule", one(packet{dst: far4, port: 6081}), false},
		attack{"WireGuard", "no_rule", one(packet{dst: far4, port: 51820}), false},
	)
}

// A rule for HTTPS is not one for QUIC.
func TestQUICNeedsItsOwnRule(t *testing.T) {
	b := theWorld(t).sandbox(t, "- {name: web, action: allow, to: [{cidr: 192.0.2.0/24}, {cidr: '2001:db8::/64'}], ports: [443/tcp]}\n")
	initial := append([]byte{0xc3, 0, 0, 0, 1, 8}, make([]byte, 1200)...) // a long header
	b.repel(t,
		attack{"initial", "no_rule", one(packet{dst: far4, payload: initial}), false},
		attack{"initial, IPv6", "no_rule", one(packet{dst: far6, payload: initial}), false},
	)
}
