// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The sender says that it is someone else.
func TestSpoofedSender(t *testing.T) {
	n := theWorld(t)
	b, victim := n.sandbox(t, allowAll), n.sandbox(t, allowAll)
	for _, dst := range []netip.Addr{far4, far6} {
		v6 := dst.Is6()
		// With a neighbour's addresses, the host's, a stranger's.
		for _, src := range []netip.Addr{
			victim.addr(v6), n.open2.addr(v6),
			map[bool]netip.Addr{false: host4, true: host6}[v6],
			map[bool]netip.Addr{false: netip.MustParseAddr("203.0.113.200"), true: netip.MustParseAddr("2001:db8:1::200")}[v6],
		} {
			p := packet{dst: dst, src: src}
			// A host does not take a packet from its own address.
			self := src == host4
			b.repel(t, attack{fmt.Sprintf("from %s", src), "spoof_ip", one(p), self})
		}
		for _, mac := range []net.HardwareAddr{victim.mac, openMAC(5), {2, 0, 0, 0, 0, 9}} {
			b.repel(t, attack{fmt.Sprintf("from %s to %s", mac, dst), "spoof_mac", one(packet{dst: dst, srcMAC: mac}), false})
		}
	}
	t.Run("neighbour table", func(t *testing.T) { arpSpoof(t, n, b) })
}

// arpSpoof tells the host that another's address is at the sender.
func arpSpoof(t *testing.T, n *node, b *box) {
	claim := func(from *box, of netip.Addr, op byte) []byte {
		f := append(append([]byte{}, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), from.mac...)
		f = append(f, 8, 6, 0, 1, 8, 0, 6, 4, 0, op)
		f = append(append(f, from.mac...), of.AsSlice()...)
		return append(append(f, make([]byte, 6)...), of.AsSlice()...)
	}
	real := net.HardwareAddr{2, 0, 0, 0, 0, 0x77}
	for op, what := range map[byte]string{1: "gratuitous request", 2: "unasked reply"} {
		for _, from := range []*box{n.open, b} {
			of := netip.MustParseAddr("198.51.100.77")
			must(t, neighbour(from.host, of, real, netlink.NUD_STALE))
			before := map[string]uint64{}
			if from == b {
				before = b.drops(t)
			}
			time.Sleep(settle) // the kernel believes no second answer in the same tick
			from.send(t, claim(from, of, op))
			believes := func() string {
				mac, err := hardwareOf(from.host, of)
				must(t, err)
				return mac
			}
			if from == n.open {
				eventually(t, func() string {
					if got := believes(); got != from.mac.String() {
						return fmt.Sprintf("control: %s: the host believes %s, not the attacker", what, got)
					}
					return ""
				})
				continue
			}
			if b.dropped(t, "arp", before, 1) != 1 {
				t.Errorf("%s: not dropped as arp: %v", what, b.drops(t))
			}
			if got := believes(); got != real.String() {
				t.Errorf("%s: the host believes %s", what, got)
			}
		}
	}
}

var (
	rogueLL     = netip.MustParseAddr("fe80::bad")
	roguePrefix = netip.MustParsePrefix("2001:db8:bad::/64")
)

// routerAdvert says: I am your default router, and this is your prefix.
func routerAdvert(mac net.HardwareAddr) packet {
	l4 := []byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}
	l4 = append(l4, 3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0)
	l4 = append(append(l4, roguePrefix.Addr().AsSlice()...), 1, 1)
	l4 = append(l4, mac...)
	return packet{dst: netip.MustParseAddr("ff02::1"), src: rogueLL, proto: protoICMP6, l4: l4, hops: 255}
}

// took says what a link of the host has taken over from a rogue router.
func took(t testing.TB, name string) string {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, err)
	addrs, err := netlink.AddrList(l, netlink.FAMILY_V6)
	must(t, err)
	var out []string
	for _, a := range addrs {
		if ip, _ := netip.AddrFromSlice(a.IP); roguePrefix.Contains(ip) {
			out = append(out, "an address")
		}
	}
	routes, err := netlink.RouteList(l, netlink.FAMILY_V6)
	must(t, err)
	for _, r := range routes {
		if r.Gw.String() == rogueLL.String() {
			out = append(out, "a default route")
		}
	}
	return strings.Join(out, " and ")
}

// CVE-2020-10749 and its like.
func TestRogueRouter(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, allowAll)
	n.open.send(t, routerAdvert(n.open.mac).from(n.open))
	eventually(t, func() string {
		if got := took(t, n.open.host); got != "an address and a default route" {
			return fmt.Sprintf("control: the host took %q from a router advertisement", got)
		}
		return ""
	})
	before := b.drops(t)
	b.send(t, routerAdvert(b.mac).from(b))
	if b.dropped(t, "neighbour", before, 1) != 1 {
		t.Errorf("not dropped: %v", b.drops(t))
	}
	b.pass(t)
	if got := took(t, b.host); got != "" {
		t.Errorf("the host took %s", got)
	}
	// The second lock: the host's end would not believe it.
	for _, s := range []string{"accept_ra", "accept_redirects", "autoconf"} {
		v, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + b.host + "/" + s)
		must(t, err)
		if strings.TrimSpace(string(v)) != "0" {
			t.Errorf("%s of the host's end is %s", s, v)
		}
	}
	// Take the route back: it would be the host's for the tests that follow.
	withdraw := routerAdvert(n.open.mac)
	withdraw.l4[6], withdraw.l4[7] = 0, 0
	n.open.send(t, withdraw.from(n.open))
	eventually(t, func() string {
		if strings.Contains(took(t, n.open.host), "route") {
			return "the rogue default route stays"
		}
		return ""
	})
}

func TestNeighbourDiscoveryAndRedirects(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, allowAll)
	of := netip.MustParseAddr("2001:db8:2::77")
	real := net.HardwareAddr{2, 0, 0, 0, 0, 0x77}
	claim := func(from *box) packet {
		l4 := append([]byte{136, 0, 0, 0, 0x20, 0, 0, 0}, of.AsSlice()...)
		l4 = append(append(l4, 2, 1), from.mac...)
		return packet{dst: netip.MustParseAddr("ff02::1"), src: of, proto: protoICMP6, l4: l4, hops: 255}
	}
	believes := func(from *box) string {
		mac, err := hardwareOf(from.host, of)
		must(t, err)
		return mac
	}
	must(t, neighbour(n.open.host, of, real, netlink.NUD_STALE))
	n.open.send(t, claim(n.open).from(n.open))
	eventually(t, func() string {
		if got := believes(n.open); got != n.open.mac.String() {
			return fmt.Sprintf("control: the host believes %q, not the attacker", got)
		}
		return ""
	})
	must(t, neighbour(b.host, of, real, netlink.NUD_STALE))
	before := b.drops(t)
	b.send(t, claim(b).from(b))
	if b.dropped(t, "neighbour", before, 1) != 1 {
		t.Errorf("not dropped: %v", b.drops(t))
	}
	if got := believes(b); got != real.String() {
		t.Errorf("the host believes %q", got)
	}

	redirect6 := append([]byte{137, 0, 0, 0, 0, 0, 0, 0}, append(rogueLL.AsSlice(), other6.AsSlice()...)...)
	solicit := append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, host6.AsSlice()...)
	b.repel(t,
		attack{"IPv6 redirect", "neighbour", one(packet{dst: host6, src: rogueLL, proto: protoICMP6, l4: redirect6, hops: 255}), true},
		attack{"IPv4 redirect", "icmp", one(packet{dst: far4, proto: protoICMP, l4: []byte{5, 1, 0, 0, 192, 0, 2, 9}}), false},
		attack{"router solicitation", "neighbour", one(packet{dst: netip.MustParseAddr("ff02::2"), proto: protoICMP6, l4: []byte{133, 0, 0, 0, 0, 0, 0, 0}, hops: 255}), true},
		attack{"neighbour solicitation", "neighbour", one(packet{dst: host6, proto: protoICMP6, l4: solicit, hops: 255}), true},
		attack{"listener report", "neighbour", one(packet{dst: netip.MustParseAddr("ff02::16"), proto: protoICMP6, l4: []byte{143, 0, 0, 0, 0, 0, 0, 0}, hops: 1}), true},
	)
}

// Services that answer whoever asks loudly enough: DHCP, mDNS, LLMNR.
func TestBroadcastAndMulticast(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, allowAll)
	var attacks []attack
	for _, c := range []struct {
		name, addr string
		port       uint16
		reason     string
	}{
		{"DHCP", "255.255.255.255", 67, "broadcast"},
		{"mDNS", "224.0.0.251", 5353, "multicast"},
		{"LLMNR", "224.0.0.252", 5355, "multicast"},
		{"SSDP", "239.255.255.250", 1900, "multicast"},
		{"IPv6 mDNS", "ff02::fb", 5353, "multicast"},
		{"IPv6 LLMNR", "ff02::1:3", 5355, "multicast"},
		{"DHCPv6", "ff02::1:2", 547, "multicast"},
		{"all nodes", "ff02::1", 9999, "multicast"},
	} {
		dst := netip.MustParseAddr(c.addr)
		listen := dst
		if c.reason == "broadcast" {
			listen = netip.IPv4Unspecified()
		}
		n.hearUDP(t, 0, listen, c.port, n.open.link, b.link)
		attacks = append(attacks, attack{c.name, c.reason, one(packet{dst: dst, port: c.port}), false})
	}
	b.repel(t, attacks...)
	b.repel(t,
		attack{"DHCP without an address", "spoof_ip", one(packet{dst: netip.MustParseAddr("255.255.255.255"), src: netip.IPv4Unspecified(), port: 67}), false},
		attack{"subnet broadcast", "host", one(packet{dst: netip.MustParseAddr("192.0.2.255"), port: 67}), true},
	)
}

// What a cgroup's hooks do not see: whatever kind of socket the packet is made
// with, it crosses the link.
func TestRawSockets(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, "")
	b.repel(t,
		attack{"packet socket, IPv4", "no_rule", one(packet{dst: other4, port: 7777}), false},
		attack{"packet socket, IPv6", "no_rule", one(packet{dst: other6, port: 7777}), false},
	)
	n.socketAttack(t, b, "raw socket with its own IP header", func(from *box, k token) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		p := packet{dst: other4, src: from.addr4, port: 7777, payload: k[:]}
		return errors.Join(unix.Sendto(fd, p.ip(), 0, &unix.SockaddrInet4{Addr: other4.As4()}), unix.Close(fd))
	})
	n.socketAttack(t, b, "raw UDP socket", func(_ *box, k token) error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
		if err != nil {
			return err
		}
		l4 := append([]byte{0xc3, 0x50, 0x1e, 0x61, 0, 12, 0, 0}, k[:]...)
		return errors.Join(unix.Sendto(fd, l4, 0, &unix.SockaddrInet6{Addr: other6.As16()}), unix.Close(fd))
	})
}

// socketAttack runs f inside the open box, where its token must arrive, and
// inside the sandbox, where it must be dropped as no_rule.
func (n *node) socketAttack(t *testing.T, b *box, name string, f func(from *box, k token) error) {
	t.Helper()
	try := func(from *box) token {
		k := newToken()
		n.await(k)
		if err := in(from.ns, func() error { return f(from, k) }); err != nil {
			t.Fatalf("%s from %s: %v", name, from, err)
		}
		return k
	}
	k := try(n.open)
	if n.waitFor(k, 1, patience) == 0 {
		t.Errorf("%s: control: the attack does not arrive without a filter", name)
	}
	n.forget(k)
	before := b.drops(t)
	k = try(b)
	if b.dropped(t, "no_rule", before, 1) == 0 {
		t.Errorf("%s: not dropped: %v", name, b.drops(t))
	}
	b.pass(t)
	if n.count(k) != 0 {
		t.Errorf("%s: arrived", name)
	}
	n.forget(k)
}

// Nothing of connect(2) is called: hooks there see nothing.
func TestUnconnectedUDP(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, "- {name: web, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [443/tcp]}\n")
	to := &unix.SockaddrInet4{Port: 7777, Addr: other4.As4()}
	socket := func(f func(fd int) error) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return errors.Join(f(fd), unix.Close(fd))
	}
	n.socketAttack(t, b, "sendto", func(_ *box, k token) error {
		return socket(func(fd int) error { return unix.Sendto(fd, k[:], 0, to) })
	})
	n.socketAttack(t, b, "sendmsg", func(_ *box, k token) error {
		return socket(func(fd int) error { return unix.Sendmsg(fd, k[:], nil, to, 0) })
	})
	n.socketAttack(t, b, "sendto from a socket that is connected elsewhere", func(_ *box, k token) error {
		return socket(func(fd int) error {
			return errors.Join(unix.Connect(fd, &unix.SockaddrInet4{Port: fencePort, Addr: far4.As4()}), unix.Sendto(fd, k[:], 0, to))
		})
	})
	n.socketAttack(t, b, "io_uring", func(_ *box, k token) error {
		return socket(func(fd int) error { return ringSend(fd, k[:], to) })
	})
}
