// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// What is billed is what leaves, to the byte: the oracle is a capture behind
// the program, on a device that takes no packet larger than the MTU.
func TestBytesEqualCapture(t *testing.T) {
	w := newWorld(t)
	e := open(t, testConfig(t))
	sb := sandbox(testSlot, w.link, compile(t, allowAll))
	noOffload(t, w.host, "up0")
	noOffload(t, w.host, "bh0")
	out := newCapture(t, w.host, w.uplink, unix.PACKET_OUTGOING)
	back := newCapture(t, w.host, w.link, unix.PACKET_OUTGOING)
	before := newCapture(t, w.host, w.link, unix.PACKET_HOST)
	w.attach(t, e, sb)

	const size = 8 << 20
	for _, addr := range []netip.Addr{up4, up6} {
		w.serve(t, addr, 5000, func(c net.Conn) { io.Copy(io.Discard, c) })
		w.serve(t, addr, 5001, func(c net.Conn) { c.Write(make([]byte, size)) })
	}
	equal := func() string {
		c := counters(t, e, testSlot)
		got := []uint64{c.EgressPackets, c.EgressBytes, c.EgressWireBytes, c.IngressPackets, c.IngressBytes}
		want := []uint64{
			out.packets.Load(), out.bytes.Load(), out.bytes.Load() + 14*out.packets.Load(),
			back.packets.Load(), back.bytes.Load(),
		}
		return cmp.Diff(want, got)
	}
	for _, c := range []struct {
		name string
		do   func(addr netip.Addr) error
	}{
		{"upload", func(addr netip.Addr) error {
			c, err := w.dial("tcp", addr, 5000)
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write(make([]byte, size))
			return err
		}},
		{"download", func(addr netip.Addr) error {
			c, err := w.dial("tcp", addr, 5001)
			if err != nil {
				return err
			}
			defer c.Close()
			n, err := io.Copy(io.Discard, c)
			if n != size {
				return fmt.Errorf("got %d bytes: %w", n, err)
			}
			return nil
		}},
		{"udp", func(addr netip.Addr) error {
			c, err := w.dial("udp", addr, 5002)
			if err != nil {
				return err
			}
			defer c.Close()
			for n := range 100 {
				c.Write(make([]byte, n*10)) // the peer's "port unreachable" may come back as an error
			}
			return nil
		}},
		{"udp segmentation", func(addr netip.Addr) error {
			c, err := w.dial("udp", addr, 5002)
			if err != nil {
				return err
			}
			defer c.Close()
			raw, err := c.(*net.UDPConn).SyscallConn()
			if err != nil {
				return err
			}
			raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, 1200) })
			if err != nil {
				return err
			}
			for range 20 {
				c.Write(make([]byte, 12345))
			}
			return nil
		}},
	} {
		for _, addr := range []netip.Addr{up4, up6} {
			if err := c.do(addr); err != nil {
				t.Fatalf("%s to %s: %v", c.name, addr, err)
			}
			eventually(t, func() string {
				if diff := equal(); diff != "" {
					return fmt.Sprintf("%s to %s: packets, bytes, wire bytes, ingress packets, bytes (-captured +counted):\n%s", c.name, addr, diff)
				}
				return ""
			})
		}
	}
	c := counters(t, e, testSlot)
	if before.packets.Load() > c.EgressPackets/2 || out.largest.Load() > 1500 {
		t.Errorf("%d packets came in and %d segments left, the largest of %d bytes: segmentation was not left to the device",
			before.packets.Load(), c.EgressPackets, out.largest.Load())
	}
	rules, err := e.RuleCounters(testID, testSlot)
	ok(t, err)
	var packets, bytes uint64
	for _, r := range rules {
		packets, bytes = packets+r.Packets, bytes+r.Bytes
	}
	if packets != c.EgressPackets || bytes != c.EgressBytes {
		t.Errorf("rules: %d packets, %d bytes, egress %d, %d", packets, bytes, c.EgressPackets, c.EgressBytes)
	}
}

func TestPolicyOnTheWire(t *testing.T) {
	w := newWorld(t)
	e := open(t, testConfig(t))
	only5000 := compile(t, "- {name: one, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [5000/tcp]}\n")
	echo := func(c net.Conn) { io.Copy(c, c) }
	for _, port := range []uint16{5000, 5001} {
		w.serve(t, up4, port, echo)
		w.serve(t, up6, port, echo)
	}
	w.attach(t, e, sandbox(testSlot, w.link, only5000))

	c, err := w.dial("tcp", up4, 5000)
	ok(t, err)
	defer c.Close()
	ping := func(limit time.Duration) error {
		c.SetDeadline(time.Now().Add(limit))
		if _, err := c.Write([]byte("ping")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 4))
		return err
	}
	ok(t, ping(5*time.Second))
	for _, a := range []struct {
		addr netip.Addr
		port uint16
	}{{up4, 5001}, {up6, 5000}, {up6, 5001}} {
		if c, err := w.dialWithin(300*time.Millisecond, "tcp", a.addr, a.port); err == nil {
			c.Close()
			t.Errorf("connected to %s port %d", a.addr, a.port)
		}
	}
	if got := drops(t, e, testSlot)["no_rule"]; got < 3 {
		t.Errorf("drops for no_rule: got %d, want 3 or more", got)
	}

	// Revoked: the next packet of the live flow does not pass, nor any other.
	ok(t, e.SetPolicy(testID, testSlot, netpol.Program{}, 2, nil))
	was := counters(t, e, testSlot)
	if err := ping(300 * time.Millisecond); err == nil {
		t.Error("the flow lives on after its rule has gone")
	}
	is := counters(t, e, testSlot)
	if is.EgressPackets != was.EgressPackets {
		t.Errorf("%d packets left after the rule had gone", is.EgressPackets-was.EgressPackets)
	}
	if got := drops(t, e, testSlot)["no_rule"]; got < 4 {
		t.Errorf("drops for no_rule: got %d, want 4 or more", got)
	}

	// Allowed again: TCP repeats itself and the same flow goes on.
	ok(t, e.SetPolicy(testID, testSlot, only5000, 3, nil))
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
		t.Errorf("the flow did not go on: %v", err)
	}
}

// The rows of the threat matrix that a test run cannot make: frames written by
// a sandbox that may open packet sockets.
func TestRawFramesFromTheSandbox(t *testing.T) {
	w := newWorld(t)
	e := open(t, testConfig(t))
	for ns, name := range map[nsHandle]string{w.box: "eth0", w.host: "bh0"} {
		h := handle(t, ns)
		l, err := h.LinkByName(name)
		ok(t, err)
		ok(t, h.LinkSetMTU(l, 9000))
	}
	// The policy allows everything; the target is the host itself, which is no
	// hard deny here so that only the parser can stop a frame.
	w.attach(t, e, sandbox(testSlot, w.link, compile(t, allowAll)))
	var target *net.UDPConn
	ok(t, in(w.host, func() (err error) {
		target, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(host4, 7000)))
		return err
	}))
	defer target.Close()
	heard := func() bool {
		target.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, _, err := target.ReadFrom(make([]byte, 16384))
		return err == nil
	}
	var fd int
	ok(t, in(w.box, func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	defer unix.Close(fd)
	eth0, err := handle(t, w.box).LinkByName("eth0")
	ok(t, err)
	send := func(b []byte) {
		t.Helper()
		if err := unix.Sendto(fd, b, 0, &unix.SockaddrLinklayer{Ifindex: eth0.Attrs().Index, Halen: 6}); err != nil {
			t.Fatalf("send %d bytes: %v", len(b), err)
		}
	}

	udp := frame{dst: host4, udp: true, port: 7000, payload: 30}
	send(udp.bytes())
	if !heard() {
		t.Fatal("an honest frame did not arrive")
	}
	long := udp
	long.payload = 6000 // only the first bytes are linear
	send(long.bytes())
	if !heard() {
		t.Error("a long honest frame did not arrive")
	}
	if got, want := counters(t, e, testSlot).EgressBytes, uint64(58+6028); got != want {
		t.Errorf("egress bytes: got %d, want %d", got, want)
	}

	tagged := func(tags ...uint16) frame { f := udp; f.tags = tags; return f }
	options, fragment, spoofed, bad := udp, udp, udp, long
	options.options = []byte{1, 1, 1, 1}
	fragment.frag = 0x2000
	spoofed.src = addr4(9)
	bad.udpBy = -1
	for _, c := range []struct {
		name string
		data []byte
		want string
	}{
		{"tag", tagged(0x8100).bytes(), "vlan"},
		{"two tags", tagged(0x8100, 0x8100).bytes(), "vlan"},
		{"qinq", tagged(0x88a8, 0x8100).bytes(), "vlan"},
		{"three tags", tagged(0x8100, 0x8100, 0x8100).bytes(), "vlan"},
		{"options", options.bytes(), "ip_options"},
		{"fragment", fragment.bytes(), "fragment"},
		{"spoofed", spoofed.bytes(), "spoof_ip"},
		{"long and wrong", bad.bytes(), "bad_length"},
		{"half an IPv4 header", udp.bytes()[:24], "short"},
		{"half an IPv6 header", frame{dst: up6, udp: true}.bytes()[:40], "short"},
		{"gratuitous arp", frame{dst: host4, ether: 0x0806}.bytes(), "arp"},
		{"router advertisement", frame{dst: netip.MustParseAddr("ff02::1"), src: gate6, proto: 58, l4: append([]byte{134}, make([]byte, 15)...)}.bytes(), "neighbour"},
	} {
		before := drops(t, e, testSlot)[c.want]
		send(c.data)
		if heard() {
			t.Errorf("%s: delivered", c.name)
		}
		// Its own IPv6 stack may add to the noise.
		if got := drops(t, e, testSlot)[c.want]; got != before+1 && (c.want != "neighbour" || got <= before) {
			t.Errorf("%s: drops for %s: got %d more, want 1; all %v", c.name, c.want, got-before, drops(t, e, testSlot))
		}
	}
}

// Everything that is pinned goes on when the process dies, and is found again.
func TestReopenAfterCrash(t *testing.T) {
	w := newWorld(t)
	cfg := testConfig(t)
	e := open(t, cfg)
	rules := "- {name: one, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [5000/tcp]}\n"
	sb := sandbox(testSlot, w.link, compile(t, rules))
	w.serve(t, up4, 5000, func(c net.Conn) { io.Copy(c, c) })
	w.attach(t, e, sb)
	ok(t, e.SetHostAddrs([]netip.Prefix{netip.MustParsePrefix("198.51.100.7/32")}))
	c, err := w.dial("tcp", up4, 5000)
	ok(t, err)
	defer c.Close()
	ping := func() {
		t.Helper()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err := c.Write([]byte("ping"))
		ok(t, err)
		_, err = io.ReadFull(c, make([]byte, 4))
		ok(t, err)
	}
	ping()
	rule := func() RuleCount {
		t.Helper()
		got, err := e.RuleCounters(testID, testSlot)
		ok(t, err)
		if len(got) != 1 {
			t.Fatalf("rules: got %v, want one", got)
		}
		return got[0]
	}
	first, firstRule := counters(t, e, testSlot), rule()
	ok(t, e.Close())
	ping() // nobody is there; verdicts and counters go on

	e = open(t, cfg)
	if ids, err := e.List(); err != nil || cmp.Diff([]string{testID}, ids) != "" {
		t.Errorf("list: got %v, %v", ids, err)
	}
	ok(t, in(w.host, func() error { return e.Verify(testID, testSlot, w.link) }))
	second, secondRule := counters(t, e, testSlot), rule()
	if second.EgressBytes <= first.EgressBytes || secondRule.Bytes <= firstRule.Bytes || secondRule.Rule != "one" || secondRule.Tenant != "acme" {
		t.Errorf("counters did not go on: %+v, %+v, then %+v, %+v", first, firstRule, second, secondRule)
	}
	if x, err := e.Explain(testSlot, netpol.Flow{Proto: netpol.TCP, Dst: netip.MustParseAddr("198.51.100.7"), Port: 443}); err != nil || x.Reason != "host" {
		t.Errorf("host addresses were forgotten: %+v, %v", x, err)
	}

	// The agent attaches again with what it has on disk.
	w.attach(t, e, sb)
	if again := counters(t, e, testSlot); again.EgressBytes < second.EgressBytes {
		t.Errorf("attach reset the counters: %+v, then %+v", second, again)
	}
	ping()
	if got := rule(); got.Bytes <= secondRule.Bytes {
		t.Errorf("rule counter did not go on: %+v, then %+v", secondRule, got)
	}
	ok(t, e.SetPolicy(testID, testSlot, compile(t, "- {name: zero, action: deny, to: [{cidr: 10.0.0.0/8}]}\n"+rules), 7, nil))
	ping()
	got, err := e.RuleCounters(testID, testSlot)
	ok(t, err)
	if len(got) != 2 || got[0].Rule != "one" || got[0].Bytes <= secondRule.Bytes || got[1].Bytes != 0 {
		t.Errorf("rule counters after a change of order: %+v", got)
	}

	// Gone, and back: a new life starts at zero, and nothing is left pinned.
	w.down(t)
	ok(t, in(w.host, func() error { return e.Detach(testID, testSlot) }))
	ok(t, in(w.host, func() error { return e.Detach(testID, testSlot) }))
	left, err := os.ReadDir(e.dir + "/links")
	ok(t, err)
	if len(left) != 0 {
		t.Errorf("pins left: %v", left)
	}
	if _, err := e.Counters(testSlot); err == nil {
		t.Error("counters of a free slot")
	}
	ok(t, in(w.host, func() error { return e.Attach(t.Context(), sb) }))
	if got := counters(t, e, testSlot); got.EgressBytes != 0 || len(got.Drops) != 0 {
		t.Errorf("second life starts with %+v", got)
	}
}
