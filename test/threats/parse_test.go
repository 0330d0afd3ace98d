// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Under a policy that allows every address and port, what is dropped here is
// dropped because of what the frame is.

var padding = make([]byte, 24)

func TestE1StackedVLANTags(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	var attacks []attack
	for name, tags := range map[string][]uint16{
		"8100/8100":      {0x8100, 0x8100},
		"88a8/8100":      {0x88a8, 0x8100},
		"8100/8100/8100": {0x8100, 0x8100, 0x8100},
	} {
		attacks = append(attacks, attack{name: name, reason: "vlan", frames: one(packet{dst: far4, tags: tags})})
	}
	b.repel(t, attacks...)
}

// A SYN whose port number is not in the first fragment.
func TestE2SplitSYN(t *testing.T) {
	b := theWorld(t).sandbox(t, "- {name: web, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [443/tcp]}\n")
	split := func(options []byte) func(b *box, k token) [][]byte {
		return func(b *box, k token) [][]byte {
			return packet{dst: far4, syn: true, port: 9999, options: options, payload: k[:]}.fragments(b, 8, 16)
		}
	}
	b.repel(t, attack{name: "8+12 bytes", reason: "fragment", frames: split(nil)})
	b.repel(t, attack{name: "8+12 bytes and options", reason: "ip_options", frames: split([]byte{1, 1, 1, 1})})
}

// 443 where a parser finds it that believes every IPv4 header to have 20
// bytes; 9999 where it is.
func TestE3PortInsideOptions(t *testing.T) {
	b := theWorld(t).sandbox(t, "- {name: web, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [443/tcp]}\n")
	b.repel(t, attack{"01 bb in options", "ip_options", one(packet{
		dst: far4, syn: true, port: 9999, options: []byte{1, 1, 0x01, 0xbb, 5, 0, 0, 0}, // bb begins an unknown option of five bytes
	}), false})
}

// Only the Ethernet header of a long frame of a packet socket is linear.
func TestE4FrameThatIsNotLinear(t *testing.T) {
	b := theWorld(t).sandbox(t, "- {name: one, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [7000/udp]}\n")
	long := func(port uint16, dst netip.Addr) func(*box, token) [][]byte {
		return func(b *box, k token) [][]byte {
			return [][]byte{packet{dst: dst, port: port, payload: append(k[:], make([]byte, 6000)...)}.from(b)}
		}
	}
	b.repel(t,
		attack{"IPv4, wrong port", "no_rule", long(7001, far4), false},
		attack{"IPv6", "no_rule", long(7000, far6), false},
	)
	// It is read, not thrown away.
	k := newToken()
	b.node.await(k)
	defer b.node.forget(k)
	b.send(t, long(7000, far4)(b, k)...)
	if b.node.waitFor(k, 1, patience) == 0 {
		t.Error("a long honest frame did not arrive")
	}
}

func TestIPv6LeftOpen(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll4)
	b.repel(t,
		attack{"UDP", "no_rule", one(packet{dst: far6}), false},
		attack{"SYN", "no_rule", one(packet{dst: far6, syn: true}), false},
		attack{"UDP elsewhere", "no_rule", one(packet{dst: other6}), false},
	)
	serveEcho(t, b.node, netip.AddrPortFrom(far6, 5000))
	if !b.node.open.connects(netip.AddrPortFrom(far6, 5000), patience) {
		t.Fatal("control: no connection over IPv6")
	}
	if b.connects(netip.AddrPortFrom(far6, 5000), refused) {
		t.Error("connected over IPv6 under a policy for IPv4")
	}
}

func TestMappedAddresses(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	b.repel(t,
		attack{"mapped", "v4_mapped", one(packet{dst: netip.MustParseAddr("::ffff:192.0.2.2")}), false},
		attack{"compatible", "v4_mapped", one(packet{dst: netip.MustParseAddr("::192.0.2.2")}), false},
	)
	// A socket that connects to a mapped address sends IPv4: the connect6 hook
	// of a cgroup sees it, the wire does not know.
	to := netip.AddrPortFrom(netip.MustParseAddr("::ffff:169.254.169.254"), 80)
	serveEcho(t, b.node, netip.AddrPortFrom(metadata4, 80))
	if !b.node.open.connects(to, patience) {
		t.Fatal("control: no connection to the metadata service")
	}
	before := b.drops(t)
	if b.connects(to, refused) {
		t.Error("connected to the metadata service by a mapped address")
	}
	if b.dropped(t, "metadata", before, 1) == 0 {
		t.Errorf("not counted as metadata: %v", b.drops(t))
	}
}

func TestFragments(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	cut := func(options []byte, sizes ...int) func(*box, token) [][]byte {
		return func(b *box, k token) [][]byte {
			return packet{dst: far4, payload: append(append([]byte{}, padding...), k[:]...)}.fragments(b, sizes...)
		}
	}
	v6 := func(body ...byte) extension { return extension{44, body} }
	b.repel(t,
		attack{"two", "fragment", cut(nil, 16, 64), false},
		attack{"tiny first", "fragment", cut(nil, 8, 64), false},
		attack{"three", "fragment", cut(nil, 8, 8, 64), false},
		attack{"overlapping", "fragment", func(b *box, k token) [][]byte {
			all := cut(nil, 16, 64)(b, k)
			return append(all[:1:1], all[0], all[1])
		}, false},
		attack{"last alone", "fragment", func(b *box, k token) [][]byte {
			return cut(nil, 16, 64)(b, k)[1:]
		}, true},
		attack{"more alone", "fragment", func(b *box, k token) [][]byte {
			return cut(nil, 16, 64)(b, k)[:1]
		}, true},
		attack{"reserved bit", "fragment", one(packet{dst: far4, frag: 0x8000}), false},
		attack{"IPv6 atomic", "fragment", one(packet{dst: far6, ext: []extension{v6(0, 0, 0, 1, 2, 3, 4)}}), false},
		attack{"IPv6 first alone", "fragment", one(packet{dst: far6, ext: []extension{v6(0, 0, 1, 1, 2, 3, 4)}}), true},
	)
	// Without fragments a large datagram does not leave at all; a small one does.
	c, err := b.dial("udp", netip.AddrPortFrom(far4, 7000), patience)
	must(t, err)
	defer c.Close()
	before := b.drops(t)
	if _, err := c.Write(make([]byte, 20000)); err != nil {
		t.Fatal(err)
	}
	if b.dropped(t, "fragment", before, 3) < 3 {
		t.Errorf("a datagram of 20000 bytes was not dropped as fragments: %v", b.drops(t))
	}
}

func TestIPv4Options(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	var attacks []attack
	for words := 1; words <= 10; words++ {
		nops := make([]byte, 4*words)
		for i := range nops {
			nops[i] = 1
		}
		attacks = append(attacks, attack{fmt.Sprintf("ihl %d", 5+words), "ip_options", one(packet{dst: far4, options: nops}), false})
	}
	// A route record, and a router alert that hosts hand to daemons.
	attacks = append(attacks,
		attack{"record route", "ip_options", one(packet{dst: far4, options: []byte{7, 7, 4, 0, 0, 0, 0, 0}}), false},
		attack{"router alert", "ip_options", one(packet{dst: far4, options: []byte{0x94, 4, 0, 0}}), false},
	)
	for ihl := range byte(5) {
		attacks = append(attacks, attack{fmt.Sprintf("ihl %d", ihl), "bad_length", func(b *box, k token) [][]byte {
			f := one(packet{dst: far4})(b, k)[0]
			f[14] = 4<<4 | ihl
			return [][]byte{f}
		}, true})
	}
	b.repel(t, attacks...)
}

func TestIPv6ExtensionHeaders(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	pad6 := []byte{0, 1, 4, 0, 0, 0, 0} // length 0, PadN
	var attacks []attack
	for _, h := range []struct {
		name  string
		kind  byte
		body  []byte
		inert bool
	}{
		{"hop by hop", 0, pad6, false},
		{"routing", 43, []byte{0, 253, 0, 0, 0, 0, 0}, false},
		{"destination", 60, pad6, false},
		{"authentication", 51, []byte{1, 0, 0, 0, 0, 0, 1}, false},
		{"mobility", 135, []byte{0, 0, 0, 0, 0, 0, 0}, false},
		{"host identity", 139, []byte{0, 0, 0, 0, 0, 0, 0}, false},
		{"shim6", 140, []byte{0, 0, 0, 0, 0, 0, 0}, false},
	} {
		for times := 1; times <= 5; times++ {
			var chain []extension
			for range times {
				chain = append(chain, extension{h.kind, h.body})
			}
			// A second hop-by-hop header is no longer one that hosts read.
			attacks = append(attacks, attack{
				fmt.Sprintf("%s x%d", h.name, times), "ext_header",
				one(packet{dst: far6, ext: chain}), h.inert || h.kind == 0 && times > 1,
			})
		}
	}
	attacks = append(attacks,
		attack{"ESP", "ext_header", one(packet{dst: far6, proto: 50, l4: padding}), false},
		attack{"no next header", "ext_header", one(packet{dst: far6, proto: 59, l4: []byte{}}), false},
	)
	b.repel(t, attacks...)
}

// A router does not look behind the IP header, so what is too short for TCP or
// UDP is forwarded.
func TestTruncated(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	var attacks []attack
	for _, dst := range []netip.Addr{far4, far6} {
		for size := range 20 {
			if size >= 4 {
				attacks = append(attacks, attack{fmt.Sprintf("TCP of %d bytes to %s", size, dst), "bad_length",
					one(packet{dst: dst, proto: protoTCP, l4: make([]byte, size-4), badSum: true}), false})
			}
			if size >= 4 && size < 8 {
				attacks = append(attacks, attack{fmt.Sprintf("UDP of %d bytes to %s", size, dst), "bad_length",
					one(packet{dst: dst, proto: protoUDP, l4: make([]byte, size-4)}), false})
			}
		}
	}
	b.repel(t, attacks...)
	// Frames that end inside a header: no host reads them. None may be let pass.
	var cut []attack
	for size := 14; size < 34; size++ {
		cut = append(cut, attack{fmt.Sprintf("IPv4 frame of %d bytes", size), "short", func(b *box, k token) [][]byte {
			return [][]byte{one(packet{dst: far4})(b, k)[0][:size]}
		}, true})
	}
	for size := 14; size < 54; size += 3 {
		cut = append(cut, attack{fmt.Sprintf("IPv6 frame of %d bytes", size), "short", func(b *box, k token) [][]byte {
			return [][]byte{one(packet{dst: far6})(b, k)[0][:size]}
		}, true})
	}
	b.repel(t, cut...)
}

func TestBadVersionOrLength(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	udpSays := func(dst netip.Addr, size uint16) packet {
		l4 := []byte{0xc3, 0x50, 1, 0xbb, 0, 0, 0, 0}
		binary.BigEndian.PutUint16(l4[4:], size)
		return packet{dst: dst, proto: protoUDP, l4: l4}
	}
	tcpSays := func(dst netip.Addr, words byte) packet {
		l4 := make([]byte, 20)
		l4[3], l4[12], l4[13] = 80, words<<4, 2
		return packet{dst: dst, proto: protoTCP, l4: l4}
	}
	var attacks []attack
	for _, dst := range []netip.Addr{far4, far6} {
		attacks = append(attacks,
			attack{"IP shorter than the frame", "bad_length", one(packet{dst: dst, trailer: padding}), false},
			attack{"UDP longer than IP", "bad_length", one(udpSays(dst, 2000)), false},
			attack{"UDP shorter than IP", "bad_length", one(udpSays(dst, 8)), false},
			attack{"UDP of length 0", "bad_length", one(udpSays(dst, 0)), false},
			attack{"TCP header beyond the packet", "bad_length", one(tcpSays(dst, 15)), false},
			attack{"TCP header too small", "bad_length", one(tcpSays(dst, 1)), false},
			attack{"IP longer than the frame", "bad_length", one(packet{dst: dst, tooLong: 40}), true},
		)
		for _, version := range []byte{0xf, 5, map[bool]byte{true: 4, false: 6}[dst.Is6()]} {
			attacks = append(attacks, attack{fmt.Sprintf("version %d", version), "bad_version", one(packet{dst: dst, version: version}), true})
		}
	}
	attacks = append(attacks,
		attack{"IPv6 as IPv4", "bad_version", one(packet{dst: far6, ether: etherIPv4}), true},
		attack{"IPv4 as IPv6", "bad_version", one(packet{dst: far4, ether: etherIPv6, payload: padding}), true},
	)
	b.repel(t, attacks...)
}

// Without 8021q a host takes a tag for VLAN 0 off and goes on.
func TestVLANTags(t *testing.T) {
	b := theWorld(t).sandbox(t, allowAll)
	b.repel(t,
		attack{"priority tag", "vlan", one(packet{dst: far4, tags: []uint16{0x8100}}), false},
		attack{"priority tag, IPv6", "vlan", one(packet{dst: far6, tags: []uint16{0x8100}}), false},
		attack{"service tag", "vlan", one(packet{dst: far4, tags: []uint16{0x88a8}}), false},
		attack{"four tags", "vlan", one(packet{dst: far4, tags: []uint16{0x8100, 0x8100, 0x8100, 0x8100}}), false},
		attack{"VLAN 5", "vlan", one(packet{dst: far4, tags: []uint16{0x8100}, vid: 5}), true},
		attack{"VLAN 5, then 0", "vlan", one(packet{dst: far4, tags: []uint16{0x8100, 0x8100}, vid: 5}), true},
		attack{"9100", "vlan", one(packet{dst: far4, tags: []uint16{0x9100}}), true},
		attack{"9200", "vlan", one(packet{dst: far4, tags: []uint16{0x9200}}), true},
	)
}

// Daemons of the host listen to ethertypes on every link, lldpd and the like.
func TestOtherEthertypes(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, allowAll)
	var attacks []attack
	for _, e := range []struct {
		name  string
		ether uint16
	}{
		{"MPLS", 0x8847}, {"MPLS multicast", 0x8848}, {"PPPoE discovery", 0x8863}, {"PPPoE session", 0x8864},
		{"LLDP", 0x88cc}, {"EAPOL", 0x888e}, {"MACsec", 0x88e5}, {"PTP", 0x88f7}, {"FCoE", 0x8906}, {"RoCE", 0x8915},
		{"AoE", 0x88a2}, {"IPX", 0x8137}, {"TIPC", 0x88ca}, {"BATMAN", 0x4305}, {"NSH", 0x894f}, {"local", 0x88b5}, {"last", 0xffff},
	} {
		for _, host := range []string{n.open.host, b.host} {
			n.hearFrames(t, 0, host, e.ether)
		}
		attacks = append(attacks, attack{e.name, "ethertype", one(packet{dst: far4, ether: e.ether}), false})
	}
	for _, host := range []string{n.open.host, b.host} {
		n.hearFrames(t, 0, host, unix.ETH_P_802_2)
	}
	attacks = append(attacks, attack{"LLC", "ethertype", func(b *box, k token) [][]byte {
		f := one(packet{dst: far4, ether: 60})(b, k)[0]
		copy(f[14:], []byte{0x42, 0x42, 3}) // spanning tree
		return [][]byte{f}
	}, false})
	b.repel(t, attacks...)
}

func TestSYNWithPayloadAndFirstACK(t *testing.T) {
	b := theWorld(t).sandbox(t, "- {name: web, action: allow, to: [{cidr: 192.0.2.0/24}, {cidr: '2001:db8::/64'}], ports: [443/tcp]}\n")
	var attacks []attack
	for _, dst := range []netip.Addr{far4, far6} {
		for _, c := range []struct {
			name  string
			flags byte
		}{{"SYN with data", 2}, {"bare ACK", 16}, {"FIN", 1}, {"RST", 4}, {"SYN-ACK", 18}, {"Xmas", 0x29}, {"all flags", 0xff}} {
			attacks = append(attacks, attack{fmt.Sprintf("%s to %s", c.name, dst), "no_rule",
				one(packet{dst: dst, flags: c.flags, port: 444, payload: make([]byte, 100)}), false})
		}
	}
	b.repel(t, attacks...)
}

// serveEcho answers TCP connections at an address of the internet until the
// test ends.
func serveEcho(t testing.TB, n *node, at netip.AddrPort) {
	t.Helper()
	serveEchoIn(t, n.far, at)
}

func serveEchoIn(t testing.TB, ns netns.NsHandle, at netip.AddrPort) {
	t.Helper()
	serveIn(t, ns, at, func(c io.ReadWriter) { _, _ = io.Copy(c, c) })
}
