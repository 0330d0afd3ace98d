// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/netpol"
)

var (
	dst4 = netip.MustParseAddr("192.0.2.1")
	dst6 = netip.MustParseAddr("2001:db8::1")
)

// unit is an enforcer whose slot 1 is bound to the loopback device.
func unit(t testing.TB, rules string) *Enforcer {
	e := open(t, testConfig(t))
	place(t, e, sandbox(testSlot, 1, compile(t, rules)))
	return e
}

// expect runs from_sandbox and checks action, mark, and that exactly the
// counters that should moved did.
func expect(t *testing.T, e *Enforcer, name string, data []byte, want string) {
	t.Helper()
	before, was := drops(t, e, testSlot), counters(t, e, testSlot)
	got := run(t, e.fromSandbox, data, 0)
	after, is := drops(t, e, testSlot), counters(t, e, testSlot)
	if want == "allow" {
		if got.ret != next || got.mark != 0x62680000|testSlot {
			t.Errorf("%s: got %d, mark %#x, want it to pass marked; drops %s", name, got.ret, got.mark, cmp.Diff(before, after))
		}
		if is.EgressPackets != was.EgressPackets+1 || is.EgressBytes != was.EgressBytes+uint64(len(data)-14) {
			t.Errorf("%s: counted %d packets, %d bytes, want 1, %d", name,
				is.EgressPackets-was.EgressPackets, is.EgressBytes-was.EgressBytes, len(data)-14)
		}
	} else {
		before[want]++
		if got.ret != drop || got.mark != 0 {
			t.Errorf("%s: got %d, mark %#x, want a drop", name, got.ret, got.mark)
		}
		if is.EgressPackets != was.EgressPackets || is.EgressBytes != was.EgressBytes {
			t.Errorf("%s: a dropped packet was counted as egress", name)
		}
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("%s: drop counters (-want +got):\n%s", name, diff)
	}
}

func TestFromSandboxVerdicts(t *testing.T) {
	e := unit(t, allowAll+"- {name: no25, action: deny, to: [{cidr: 0.0.0.0/0}, {cidr: '::/0'}], ports: [25/tcp]}\n")
	other := []byte{0x02, 0x62, 0x68, 0, 0, 2}
	hop := ext{0, []byte{0, 5, 2, 0, 0, 0, 0}}
	frag := ext{44, []byte{0, 0, 0, 0, 0, 0, 1}}
	listener := make([]byte, 20)
	listener[0] = 143
	echo4, echo6, solicit := make([]byte, 8), make([]byte, 8), make([]byte, 24)
	echo4[0], echo6[0], solicit[0] = 8, 128, 135

	for _, c := range []struct {
		name string
		f    frame
		want string
	}{
		{"tcp4", frame{dst: dst4}, "allow"},
		{"tcp6", frame{dst: dst6}, "allow"},
		{"udp4", frame{dst: dst4, udp: true, payload: 100}, "allow"},
		{"udp6", frame{dst: dst6, udp: true, payload: 100}, "allow"},
		{"udp4 empty", frame{dst: dst4, udp: true}, "allow"},
		{"syn with payload", frame{dst: dst4, payload: 100}, "allow"},
		{"bare ack", frame{dst: dst4, flags: 0x10}, "allow"},
		{"syn with payload 25", frame{dst: dst4, port: 25, payload: 100}, "rule_deny"},
		{"bare ack 25", frame{dst: dst4, port: 25, flags: 0x10}, "rule_deny"},
		{"ack 25 v6", frame{dst: dst6, port: 25, flags: 0x10}, "rule_deny"},
		{"do not fragment", frame{dst: dst4, frag: 0x4000}, "allow"},
		{"tcp options", frame{dst: dst4, tcpOpts: 40}, "allow"},
		{"large", frame{dst: dst4, payload: 3000}, "allow"},

		{"vlan", frame{dst: dst4, tags: []uint16{0x8100}}, "vlan"},
		{"qinq", frame{dst: dst4, tags: []uint16{0x88a8, 0x8100}}, "vlan"},
		{"double vlan 0", frame{dst: dst4, tags: []uint16{0x8100, 0x8100}}, "vlan"},
		{"old qinq", frame{dst: dst6, tags: []uint16{0x9100}}, "vlan"},
		{"arp", frame{dst: dst4, ether: 0x0806}, "arp"},
		{"rarp", frame{dst: dst4, ether: 0x8035}, "arp"},
		{"mpls", frame{dst: dst4, ether: 0x8847}, "ethertype"},
		{"pppoe", frame{dst: dst4, ether: 0x8864}, "ethertype"},
		{"llc", frame{dst: dst4, ether: 60}, "ethertype"},

		{"version 6 in ipv4", frame{dst: dst4, version: 6}, "bad_version"},
		{"version 4 in ipv6", frame{dst: dst6, version: 4}, "bad_version"},
		{"options", frame{dst: dst4, options: []byte{1, 1, 1, 1}}, "ip_options"},
		{"port in options", frame{dst: dst4, port: 9999, options: []byte{0, 0, 1, 0xbb}}, "ip_options"},
		{"tot_len too long", frame{dst: dst4, lengthBy: 1}, "bad_length"},
		{"tot_len too short", frame{dst: dst4, lengthBy: -1, payload: 10}, "bad_length"},
		{"trailer", frame{dst: dst4, trailer: 4}, "bad_length"},
		{"payload_len too long", frame{dst: dst6, lengthBy: 1}, "bad_length"},
		{"payload_len too short", frame{dst: dst6, lengthBy: -1, payload: 10}, "bad_length"},
		{"jumbogram", frame{dst: dst6, lengthBy: -20}, "bad_length"},
		{"more fragments", frame{dst: dst4, frag: 0x2000}, "fragment"},
		{"last fragment", frame{dst: dst4, frag: 1}, "fragment"},
		{"middle fragment", frame{dst: dst4, frag: 0x2001}, "fragment"},
		{"reserved flag", frame{dst: dst4, frag: 0x8000}, "fragment"},
		{"fragment 6", frame{dst: dst6, ext: []ext{frag}}, "fragment"},
		{"atomic fragment 6", frame{dst: dst6, ext: []ext{{44, []byte{0, 0, 0, 0, 0, 0, 0}}}}, "fragment"},
		{"hop by hop", frame{dst: dst6, ext: []ext{hop}}, "ext_header"},
		{"hop by hop, then fragment", frame{dst: dst6, ext: []ext{hop, frag}}, "ext_header"},

		{"doff 0", frame{dst: dst4, doff: 16}, "bad_length"},
		{"doff 4", frame{dst: dst4, doff: 4}, "bad_length"},
		{"doff past the end", frame{dst: dst4, doff: 6}, "bad_length"},
		{"doff past the end 6", frame{dst: dst6, doff: 15}, "bad_length"},
		{"short tcp", frame{dst: dst4, proto: 6, l4: make([]byte, 19)}, "bad_length"},
		{"short tcp 6", frame{dst: dst6, proto: 6, l4: make([]byte, 19)}, "bad_length"},
		{"tiny tcp", frame{dst: dst4, proto: 6, l4: make([]byte, 4)}, "bad_length"},
		{"no l4", frame{dst: dst4, proto: 6, l4: []byte{}}, "bad_length"},
		{"no l4 6", frame{dst: dst6, proto: 17, l4: []byte{}}, "bad_length"},
		{"udp too long", frame{dst: dst4, udp: true, udpBy: 1}, "bad_length"},
		{"udp too short", frame{dst: dst4, udp: true, udpBy: -1, payload: 9}, "bad_length"},
		{"udp length 0", frame{dst: dst6, udp: true, udpBy: -8}, "bad_length"},

		{"ping", frame{dst: dst4, proto: 1, l4: echo4}, "no_rule"},
		{"ping 6", frame{dst: dst6, proto: 58, l4: echo6}, "no_rule"},
		{"ping of metadata", frame{dst: netip.MustParseAddr("169.254.169.254"), proto: 1, l4: echo4}, "metadata"},
		{"ping from elsewhere", frame{dst: dst4, src: addr4(2), proto: 1, l4: echo4}, "spoof_ip"},
		{"half a ping", frame{dst: dst4, proto: 1, l4: echo4[:7]}, "bad_length"},
		{"half a ping 6", frame{dst: dst6, proto: 58, l4: echo6[:7]}, "bad_length"},
		{"one byte of icmp", frame{dst: dst4, proto: 1, l4: echo4[:1]}, "icmp"},
		{"echo reply", frame{dst: dst4, proto: 1, l4: make([]byte, 8)}, "icmp"},
		{"no icmp", frame{dst: dst4, proto: 1, l4: []byte{}}, "short"},
		{"neighbour solicitation", frame{dst: netip.MustParseAddr("ff02::1:ff00:1"), proto: 58, l4: solicit}, "neighbour"},
		{"listener report", frame{dst: netip.MustParseAddr("ff02::16"), proto: 58, l4: listener, ext: []ext{hop}}, "neighbour"},
		{"icmp in 6", frame{dst: dst6, proto: 1, l4: make([]byte, 8)}, "protocol"},
		{"icmp6 in 4", frame{dst: dst4, proto: 58, l4: make([]byte, 8)}, "protocol"},

		{"spoofed mac", frame{dst: dst4, srcMAC: other}, "spoof_mac"},
		{"spoofed mac, arp", frame{dst: dst4, srcMAC: other, ether: 0x0806}, "spoof_mac"},
		{"spoofed ip", frame{dst: dst4, src: addr4(2)}, "spoof_ip"},
		{"spoofed ip 6", frame{dst: dst6, src: addr6(2)}, "spoof_ip"},
		{"no source", frame{dst: dst4, src: netip.IPv4Unspecified()}, "spoof_ip"},
		{"no source 6", frame{dst: dst6, src: netip.IPv6Unspecified()}, "spoof_ip"},
		{"link-local source", frame{dst: dst6, src: netip.MustParseAddr("fe80::1")}, "spoof_ip"},
		{"mapped source", frame{dst: dst6, src: netip.MustParseAddr("::ffff:100.96.0.1")}, "spoof_ip"},

		{"mapped", frame{dst: netip.MustParseAddr("::ffff:192.0.2.1")}, "v4_mapped"},
		{"mapped metadata", frame{dst: netip.MustParseAddr("::ffff:169.254.169.254")}, "v4_mapped"},
		{"compatible", frame{dst: netip.MustParseAddr("::192.0.2.1")}, "v4_mapped"},
		{"translated", frame{dst: netip.MustParseAddr("::ffff:0:192.0.2.1")}, "v4_mapped"},
		{"metadata", frame{dst: netip.MustParseAddr("169.254.169.254"), port: 80}, "metadata"},
		{"azure", frame{dst: netip.MustParseAddr("168.63.129.16")}, "metadata"},
		{"alibaba", frame{dst: netip.MustParseAddr("100.100.100.200")}, "metadata"},
		{"aws 6", frame{dst: netip.MustParseAddr("fd00:ec2::254")}, "metadata"},
		{"bmc", frame{dst: netip.MustParseAddr("169.254.0.17")}, "link_local"},
		{"link-local 6", frame{dst: netip.MustParseAddr("fe80::1")}, "link_local"},
		{"loopback", frame{dst: netip.MustParseAddr("127.0.0.1")}, "loopback"},
		{"loopback 6", frame{dst: netip.IPv6Loopback()}, "loopback"},
		{"multicast", frame{dst: netip.MustParseAddr("224.0.0.251"), udp: true}, "multicast"},
		{"multicast 6", frame{dst: netip.MustParseAddr("ff02::fb"), udp: true}, "multicast"},
		{"broadcast", frame{dst: netip.MustParseAddr("255.255.255.255"), udp: true}, "broadcast"},
		{"this network", frame{dst: netip.MustParseAddr("0.0.0.0")}, "unspecified"},
		{"unspecified 6", frame{dst: netip.IPv6Unspecified()}, "unspecified"},
		{"class e", frame{dst: netip.MustParseAddr("240.0.0.1")}, "reserved"},
		{"sandbox", frame{dst: addr4(2)}, "sandbox"},
		{"sandbox 6", frame{dst: addr6(2)}, "sandbox"},
		{"itself", frame{dst: addr4(1)}, "sandbox"},
	} {
		expect(t, e, c.name, c.f.bytes(), c.want)
	}
}

// Every value of the fields that select what a packet is. Only the two IP
// ethertypes, TCP and UDP, and a header without options may pass.
func TestFromSandboxExhaustive(t *testing.T) {
	e := unit(t, allowAll)
	plain, plain6 := frame{dst: dst4}.bytes(), frame{dst: dst6}.bytes()
	passes := func(name string, data []byte, want bool) {
		t.Helper()
		if got := run(t, e.fromSandbox, data, 0); (got.ret == next) != want || !want && got.ret != drop {
			t.Errorf("%s: got %d, pass %v expected", name, got.ret, want)
		}
	}
	for ether := range 65536 {
		data := bytes.Clone(plain)
		data[12], data[13] = byte(ether>>8), byte(ether)
		// An IPv4 packet under the ethertype of IPv6 is refused by the kernel
		// before the program sees it if it is too short to be one.
		if r, err := tryRun(e.fromSandbox, data, 0); err == nil && (r.ret == next) != (ether == 0x0800) {
			t.Errorf("ethertype %#04x: got %d", ether, r.ret)
		}
	}
	for proto := range 256 {
		data, data6 := bytes.Clone(plain), bytes.Clone(plain6)
		data[14+9], data6[14+6] = byte(proto), byte(proto)
		passes(fmt.Sprintf("protocol %d", proto), data, proto == 6)
		passes(fmt.Sprintf("next header %d", proto), data6, proto == 6)
	}
	for ihl := range byte(16) {
		data := frame{dst: dst4, payload: 60}.bytes()
		data[14] = 0x40 | ihl
		passes(fmt.Sprintf("ihl %d", ihl), data, ihl == 5)
	}
	for typ := range 256 {
		passes(fmt.Sprintf("icmp %d", typ), frame{dst: dst4, proto: 1, l4: []byte{byte(typ), 0, 0, 0, 0, 0, 0, 0}}.bytes(), false)
		passes(fmt.Sprintf("icmp6 %d", typ), frame{dst: dst6, proto: 58, l4: []byte{byte(typ), 0, 0, 0, 0, 0, 0, 0}}.bytes(), false)
	}
	for _, kind := range []byte{0, 43, 44, 50, 51, 59, 60, 135, 139, 140, 253, 254} {
		var chain []ext
		for n := range 5 {
			chain = append(chain, ext{kind, make([]byte, 7)})
			passes(fmt.Sprintf("%d headers %d", n+1, kind), frame{dst: dst6, ext: chain}.bytes(), false)
		}
	}
	for frag := range 65536 {
		data := bytes.Clone(plain)
		data[14+6], data[14+7] = byte(frag>>8), byte(frag)
		passes(fmt.Sprintf("fragment word %#x", frag), data, frag == 0 || frag == 0x4000)
	}
	for _, data := range [][]byte{plain, plain6, frame{dst: dst4, udp: true}.bytes(), frame{dst: dst6, udp: true}.bytes()} {
		for n := 14; n < len(data); n++ {
			if r, err := tryRun(e.fromSandbox, data[:n], 0); err == nil && r.ret != drop {
				t.Errorf("cut to %d of %d: got %d", n, len(data), r.ret)
			}
		}
	}
}

// What netpol lists as never allowed is not, at the edges of each prefix, for
// both protocols, whatever the policy says.
func TestHardDenies(t *testing.T) {
	cfg := testConfig(t)
	cfg.HardDeny = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("2001:db8:9::/48")}
	e := open(t, cfg)
	place(t, e, sandbox(testSlot, 1, compile(t, allowAll)))
	host := []netip.Prefix{
		netip.MustParsePrefix("198.51.100.7/32"), netip.MustParsePrefix("2001:db8:1::7/128"), netip.MustParsePrefix("127.0.0.1/32"),
	}
	if err := e.SetHostAddrs(host); err != nil {
		t.Fatal(err)
	}
	list := netpol.HardDenied()
	for _, p := range cfg.HardDeny {
		list = append(list, netpol.HardDeny{Prefix: p, Reason: "host_network"})
	}
	for _, p := range cfg.Pools {
		list = append(list, netpol.HardDeny{Prefix: p, Reason: "sandbox"})
	}
	for _, p := range host[:2] {
		list = append(list, netpol.HardDeny{Prefix: p, Reason: "host"})
	}
	denied := func(a netip.Addr) bool {
		for _, h := range list {
			if h.Prefix.Contains(a) {
				return true
			}
		}
		return mapped.Contains(a)
	}
	for _, h := range list {
		first, last := h.Prefix.Addr(), lastAddr(h.Prefix)
		for _, a := range []netip.Addr{first.Prev(), first, first.Next(), last.Prev(), last, last.Next()} {
			if !a.IsValid() {
				continue
			}
			for _, udp := range []bool{false, true} {
				got := run(t, e.fromSandbox, frame{dst: a, udp: udp}.bytes(), 0)
				if want := !denied(a); (got.ret == next) != want {
					t.Errorf("%s (edge of %s): got %d, pass %v expected", a, h.Prefix, got.ret, want)
				}
			}
		}
	}
	for reason, n := range map[string]uint64{"host": 1, "host_network": 1, "metadata": 1, "sandbox": 1} {
		if got := drops(t, e, testSlot)[reason]; got < n {
			t.Errorf("drops for %s: got %d", reason, got)
		}
	}

	expect(t, e, "host", frame{dst: host[0].Addr()}.bytes(), "host")
	expect(t, e, "special-use host address", frame{dst: host[2].Addr()}.bytes(), "loopback")
	if err := e.SetHostAddrs([]netip.Prefix{netip.MustParsePrefix("198.51.100.8/32")}); err != nil {
		t.Fatal(err)
	}
	expect(t, e, "new host address", frame{dst: netip.MustParseAddr("198.51.100.8")}.bytes(), "host")
	expect(t, e, "old host address", frame{dst: host[0].Addr()}.bytes(), "allow")
	expect(t, e, "pool", frame{dst: addr4(7)}.bytes(), "sandbox")
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// A policy for one family says nothing about the other, 0/0 neither.
func TestFamiliesAreApart(t *testing.T) {
	for _, c := range []struct{ rules, v4, v6 string }{
		{allowAll4, "allow", "no_rule"},
		{allowAll6, "no_rule", "allow"},
		{allowAll, "allow", "allow"},
	} {
		e := unit(t, c.rules)
		expect(t, e, c.rules+" v4", frame{dst: dst4}.bytes(), c.v4)
		expect(t, e, c.rules+" v6", frame{dst: dst6}.bytes(), c.v6)
	}

	// A hard deny for all of one family neither.
	cfg := testConfig(t)
	cfg.HardDeny = []netip.Prefix{netip.MustParsePrefix("::/0")}
	e := open(t, cfg)
	place(t, e, sandbox(testSlot, 1, compile(t, allowAll)))
	expect(t, e, "v4", frame{dst: dst4}.bytes(), "allow")
	expect(t, e, "v6", frame{dst: dst6}.bytes(), "host_network")

	// A sandbox without an address of a family sends nothing of it.
	e = open(t, testConfig(t))
	sb := sandbox(testSlot, 1, compile(t, allowAll))
	sb.Addrs = sb.Addrs[:1]
	place(t, e, sb)
	expect(t, e, "v4 only, v6", frame{dst: dst6}.bytes(), "spoof_ip")
	expect(t, e, "v4 only, v6 from ::", frame{dst: dst6, src: netip.IPv6Unspecified()}.bytes(), "spoof_ip")
	expect(t, e, "v4 only, v4", frame{dst: dst4}.bytes(), "allow")
}

func TestPolicyDecides(t *testing.T) {
	e := unit(t, `
- {name: web, action: allow, to: [{cidr: 192.0.2.0/24, except: [192.0.2.128/25]}], ports: [443/tcp, 8000-8010/tcp, 53/udp]}
- {name: more, action: allow, to: [{cidr: 192.0.0.0/16}], ports: [80/tcp]}
- {name: never, action: deny, to: [{cidr: 192.0.0.0/8}], ports: [8005/tcp]}
`)
	for _, c := range []struct {
		f    frame
		want string
	}{
		{frame{port: 443}, "allow"}, {frame{port: 443, udp: true}, "no_rule"},
		{frame{port: 53, udp: true}, "allow"}, {frame{port: 53}, "no_rule"},
		{frame{port: 7999}, "no_rule"}, {frame{port: 8000}, "allow"}, {frame{port: 8010}, "allow"}, {frame{port: 8011}, "no_rule"},
		{frame{port: 8005}, "rule_deny"}, {frame{port: 80}, "allow"},
		{frame{port: 443, dst: netip.MustParseAddr("192.0.2.128")}, "no_rule"},
		{frame{port: 80, dst: netip.MustParseAddr("192.0.2.128")}, "allow"},
		{frame{port: 8005, dst: netip.MustParseAddr("192.9.9.9")}, "rule_deny"},
		{frame{port: 443, dst: netip.MustParseAddr("198.51.100.1")}, "no_rule"},
	} {
		expect(t, e, fmt.Sprintf("%s %d", c.f.dst, c.f.port), c.f.bytes(), c.want)
	}

	want := []RuleCount{
		{"acme", "more", 2, 80}, {"acme", "never", 2, 80}, {"acme", "web", 4, 3*40 + 28},
	}
	got, err := e.RuleCounters(testID, testSlot)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rule counters (-want +got):\n%s", diff)
	}
}

// Whatever was not set up denies.
func TestNothingSetUp(t *testing.T) {
	e := open(t, testConfig(t))
	if got := run(t, e.fromSandbox, frame{}.bytes(), 0); got.ret != drop {
		t.Errorf("unknown link: got %d", got.ret)
	}
	if got := run(t, e.toSandbox, frame{}.toSandbox(), 0); got.ret != drop {
		t.Errorf("unknown link, ingress: got %d", got.ret)
	}
	unknown, err := e.UnknownDrops()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Drop{{"unknown_link", 2, 80}}, unknown); diff != "" {
		t.Errorf("unknown drops (-want +got):\n%s", diff)
	}

	place(t, e, sandbox(testSlot, 1, netpol.Program{}))
	expect(t, e, "empty program", frame{}.bytes(), "no_rule")
	e.shm.setPolicy(testSlot, 0, 0)
	expect(t, e, "no policy", frame{}.bytes(), "no_policy")
	e.shm.setPolicy(testSlot, 1, 99)
	expect(t, e, "policy that is not there", frame{}.bytes(), "no_policy")
	e.shm.setPolicy(testSlot, 0, 0)
	e.shm.setIfindex(testSlot, 0)
	if got := run(t, e.fromSandbox, frame{}.bytes(), 0); got.ret != drop {
		t.Errorf("closed slot: got %d", got.ret)
	}
}

// The MAC is a hint for the slot, not a proof: frames with another sandbox's
// MAC are charged to the link they came from.
func TestSlotComesFromTheLink(t *testing.T) {
	e := unit(t, allowAll)
	victim := sandbox(2, 4242, compile(t, allowAll))
	place(t, e, victim)
	expect(t, e, "victim's mac and ip", frame{srcMAC: victim.MAC, src: addr4(2)}.bytes(), "spoof_mac")
	if got := drops(t, e, 2); len(got) != 0 {
		t.Errorf("drops of the victim: %v", got)
	}

	// A MAC that says nothing about the slot works as well.
	odd := sandbox(3, 1, compile(t, allowAll))
	e = open(t, testConfig(t))
	odd.MAC = []byte{0x02, 1, 2, 0xff, 0xff, 0xff}
	place(t, e, odd)
	got := run(t, e.fromSandbox, frame{srcMAC: odd.MAC, src: addr4(3)}.bytes(), 0)
	if got.ret != next || got.mark != 0x62680003 {
		t.Errorf("odd MAC: got %d, mark %#x", got.ret, got.mark)
	}
}

func TestGSOAccounting(t *testing.T) {
	e := unit(t, allowAll)
	for _, c := range []struct {
		name     string
		f        frame
		gso      uint32
		segments uint64
		bytes    uint64
	}{
		{"tcp4", frame{dst: dst4, payload: 3000}, 1000, 3, 3000 + 3*40},
		{"tcp4 rest", frame{dst: dst4, payload: 3001}, 1000, 4, 3001 + 4*40},
		{"tcp4 options", frame{dst: dst4, payload: 2800, tcpOpts: 12}, 1448, 2, 2800 + 2*52},
		{"tcp6", frame{dst: dst6, payload: 3000}, 1000, 3, 3000 + 3*60},
		{"udp4", frame{dst: dst4, udp: true, payload: 3000}, 1200, 3, 3000 + 3*28},
		{"udp6", frame{dst: dst6, udp: true, payload: 3000}, 1200, 3, 3000 + 3*48},
		{"one byte each", frame{dst: dst4, payload: 500}, 1, 500, 500 + 500*40},
		{"larger than the packet", frame{dst: dst4, payload: 500}, 1448, 1, 540},
		{"no payload", frame{dst: dst4}, 1448, 1, 40},
	} {
		for _, ingress := range []bool{false, true} {
			was := counters(t, e, testSlot)
			var ret int32
			if ingress {
				f := c.f
				f.src = f.dst
				f.dst = addr4(1)
				if f.src.Is6() {
					f.dst = addr6(1)
				}
				ret = run(t, e.toSandbox, f.toSandbox(), c.gso).ret
			} else {
				ret = run(t, e.fromSandbox, c.f.bytes(), c.gso).ret
			}
			if ret != next {
				t.Errorf("%s: got %d", c.name, ret)
			}
			is := counters(t, e, testSlot)
			got := []uint64{is.EgressPackets - was.EgressPackets, is.EgressBytes - was.EgressBytes, is.EgressWireBytes - was.EgressWireBytes}
			if ingress {
				got = []uint64{is.IngressPackets - was.IngressPackets, is.IngressBytes - was.IngressBytes, is.IngressWireBytes - was.IngressWireBytes}
			}
			want := []uint64{c.segments, c.bytes, c.bytes + 14*c.segments}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s, ingress %v: segments, bytes, wire bytes (-want +got):\n%s", c.name, ingress, diff)
			}
		}
	}
}

func TestToSandbox(t *testing.T) {
	cfg := testConfig(t)
	cfg.HardDeny = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	e := open(t, cfg)
	place(t, e, sandbox(testSlot, 1, netpol.Program{}))
	if err := e.SetHostAddrs([]netip.Prefix{netip.MustParsePrefix("198.51.100.7/32"), netip.MustParsePrefix("169.254.1.1/32")}); err != nil {
		t.Fatal(err)
	}
	in := func(src string, f frame) frame {
		f.src = netip.MustParseAddr(src)
		if !f.dst.IsValid() {
			f.dst = addr4(1)
			if f.src.Is6() {
				f.dst = addr6(1)
			}
		}
		return f
	}
	for _, c := range []struct {
		name string
		f    frame
		want string
	}{
		{"reply", in("192.0.2.1", frame{}), "allow"},
		{"reply 6", in("2001:db8::1", frame{}), "allow"},
		{"udp", in("192.0.2.1", frame{udp: true}), "allow"},
		{"options", in("192.0.2.1", frame{options: []byte{1, 1, 1, 1}}), "allow"},
		{"fragment", in("192.0.2.1", frame{frag: 0x2000}), "allow"},
		{"icmp error", in("192.0.2.1", frame{proto: 1, l4: make([]byte, 36)}), "allow"},
		{"packet too big", in("2001:db8::1", frame{proto: 58, l4: make([]byte, 48)}), "allow"},
		{"host", in("198.51.100.7", frame{proto: 1, l4: make([]byte, 36)}), "allow"},
		{"operator's network", in("10.9.0.1", frame{}), "allow"},
		{"sandbox", in("100.96.0.2", frame{}), "in_sandbox"},
		{"sandbox 6", in("fd62:6b68::2", frame{}), "in_sandbox"},
		{"metadata", in("169.254.169.254", frame{}), "in_source"},
		{"link-local", in("169.254.1.1", frame{}), "in_source"},
		{"link-local 6", in("fe80::1", frame{proto: 58, l4: make([]byte, 16)}), "in_source"},
		{"loopback", in("127.0.0.1", frame{}), "in_source"},
		{"mapped", in("::ffff:192.0.2.1", frame{}), "in_source"},
		{"unspecified", in("::", frame{}), "in_source"},
		{"other sandbox's", in("192.0.2.1", frame{dst: addr4(2)}), "in_destination"},
		{"multicast", in("192.0.2.1", frame{dst: netip.MustParseAddr("224.0.0.1")}), "in_destination"},
		{"router advertisement", in("fe80::1", frame{dst: netip.MustParseAddr("ff02::1"), proto: 58, l4: make([]byte, 16)}), "in_destination"},
		{"arp", in("192.0.2.1", frame{ether: 0x0806}), "in_not_ip"},
		{"vlan", in("192.0.2.1", frame{tags: []uint16{0x8100}}), "in_not_ip"},
		{"version", in("192.0.2.1", frame{version: 6}), "in_malformed"},
		{"version 6", in("2001:db8::1", frame{version: 4}), "in_malformed"},
		{"ihl 4", in("192.0.2.1", frame{ihl: 4}), "in_malformed"},
	} {
		before, was := drops(t, e, testSlot), counters(t, e, testSlot)
		data := c.f.toSandbox()
		got := run(t, e.toSandbox, data, 0)
		after, is := drops(t, e, testSlot), counters(t, e, testSlot)
		packets, bytes := uint64(1), uint64(len(data)-14)
		if c.want != "allow" {
			before[c.want]++
			packets, bytes = 0, 0
		}
		if (got.ret == next) != (c.want == "allow") || cmp.Diff(before, after) != "" {
			t.Errorf("%s: got %d, drops (-want +got):\n%s", c.name, got.ret, cmp.Diff(before, after))
		}
		if is.IngressPackets-was.IngressPackets != packets || is.IngressBytes-was.IngressBytes != bytes {
			t.Errorf("%s: counted %d packets, %d bytes", c.name, is.IngressPackets-was.IngressPackets, is.IngressBytes-was.IngressBytes)
		}
	}
	if got := run(t, e.toSandbox, in("192.0.2.1", frame{proto: 132, l4: make([]byte, 100)}).toSandbox(), 50); got.ret != drop {
		t.Errorf("segments of an unknown protocol: got %d", got.ret)
	}
}

func TestReasonsHaveNames(t *testing.T) {
	seen := map[string]bool{}
	for r := range reasonCount {
		name := reasonName(r)
		if name == "" || reasonDetail(r) == "" || seen[name] {
			t.Errorf("reason %d: name %q, detail %q", r, name, reasonDetail(r))
		}
		seen[name] = true
	}
}
