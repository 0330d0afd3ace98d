// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// refused is how long a connection that must not come about is given.
const refused = 300 * time.Millisecond

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func TestTCPThroughNAT(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	ns := openNetns(t, m, l.ID)
	for _, c := range []struct{ to, want netip.Addr }{{f.addr4, f.host4}, {f.addr6, f.host6}} {
		to := serve(t, f.ns, net.JoinHostPort(c.to.String(), "0"))
		got, err := ask(ns, to, 5*time.Second)
		if err != nil || got != c.want.String() {
			t.Errorf("far end %s saw %q, %v, want %s", c.to, got, err, c.want)
		}
	}
	drops(t, m, map[string]uint64{})
	// Down cuts, Up restores.
	to := serve(t, f.ns, net.JoinHostPort(f.addr6.String(), "0"))
	must(t, m.Down(l.ID))
	if got, err := ask(ns, to, refused); err == nil {
		t.Errorf("a link that is down reached the far end as %s", got)
	}
	must(t, m.Up(l.ID))
	if _, err := ask(ns, to, 5*time.Second); err != nil {
		t.Errorf("after Down and Up: %v", err)
	}
}

// drops compares the table's counters, those of value 0 left out.
func drops(t *testing.T, m *Manager, want map[string]uint64) {
	t.Helper()
	c, err := m.counters()
	must(t, err)
	got := map[string]uint64{}
	for name, v := range c {
		if v.Packets > 0 {
			got[name] = v.Packets
		}
	}
	for name := range want { // how often TCP tries again is its own affair
		if got[name] > 0 {
			got[name] = want[name]
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("drop counters (-want +got):\n%s", d)
	}
}

func TestSecondLayerDropsUnmarked(t *testing.T) {
	m, f := open(t), newFar(t)
	l := launch(t, m, 1)
	ns := openNetns(t, m, l.ID)
	for _, a := range []netip.Addr{f.addr4, f.addr6} {
		to := serve(t, f.ns, net.JoinHostPort(a.String(), "0"))
		if got, err := ask(ns, to, refused); err == nil {
			t.Errorf("unmarked traffic reached %s as %s", a, got)
		}
	}
	drops(t, m, map[string]uint64{countUnmarked: 1})
	packets, bytes, err := m.SecondLayerDrops()
	if err != nil || packets == 0 || bytes == 0 {
		t.Errorf("SecondLayerDrops = %d, %d, %v, want some", packets, bytes, err)
	}
	for _, s := range left(t, m) {
		if strings.HasPrefix(s, "flow ") {
			t.Errorf("dropped traffic reached conntrack: %s", s)
		}
	}
}

func TestHostIsOutOfReach(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	ns := openNetns(t, m, l.ID)
	for _, a := range []netip.Addr{f.host4, f.host6} {
		to := serve(t, nil, net.JoinHostPort(a.String(), "0"))
		if got, err := ask(ns, to, refused); err == nil {
			t.Errorf("sandbox reached the host at %s as %s", a, got)
		}
		wild := serve(t, nil, "[::]:0")
		for _, gw := range []netip.Addr{Gateway4, Gateway6, a} {
			to := netip.AddrPortFrom(gw, wild.Port())
			if gw.IsLinkLocalUnicast() && gw.Is6() {
				to = netip.AddrPortFrom(gw.WithZone("eth0"), wild.Port())
			}
			if got, err := ask(ns, to, refused); err == nil {
				t.Errorf("sandbox reached the host at %s as %s", to, got)
			}
		}
	}
	drops(t, m, map[string]uint64{countToHost: 1})
}

func TestSandboxesAreApart(t *testing.T) {
	m := open(t)
	markAll(t)
	a, b := launch(t, m, 1), launch(t, m, 2)
	from := openNetns(t, m, a.ID)
	for _, addr := range []netip.Addr{b.Addr4, b.Addr6} {
		to := serve(t, openNetns(t, m, b.ID), net.JoinHostPort(addr.String(), "0"))
		if got, err := ask(from, to, refused); err == nil {
			t.Errorf("sandbox reached its neighbour at %s as %s", addr, got)
		}
	}
	drops(t, m, map[string]uint64{countToSandbox: 1})
}

func TestUnsolicitedIsDropped(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	for _, addr := range []netip.Addr{l.Addr4, l.Addr6} {
		to := serve(t, openNetns(t, m, l.ID), net.JoinHostPort(addr.String(), "0"))
		if got, err := ask(f.ns, to, refused); err == nil {
			t.Errorf("far end reached the sandbox at %s as %s", addr, got)
		}
	}
	drops(t, m, map[string]uint64{countUnsolicited: 1})
}

// TestSpoofedSourceIsDropped: the host's strict reverse path check holds even
// without a program.
func TestSpoofedSourceIsDropped(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	l, victim := launch(t, m, 1), launch(t, m, 2)
	sink := listenUDP(t, f.ns, f.addr4)
	must(t, inNetns(openNetns(t, m, l.ID), func() error {
		eth, err := netlink.LinkByName("eth0")
		must(t, err)
		must(t, netlink.AddrAdd(eth, &netlink.Addr{IPNet: &net.IPNet{IP: victim.Addr4.AsSlice(), Mask: net.CIDRMask(32, 32)}}))
		c, err := net.DialUDP("udp", &net.UDPAddr{IP: victim.Addr4.AsSlice()}, sink.LocalAddr().(*net.UDPAddr))
		if err != nil {
			return err
		}
		_, err = c.Write([]byte("as the victim"))
		return err
	}))
	if from, ok := received(sink, refused); ok {
		t.Errorf("a spoofed packet arrived from %s", from)
	}
}

// listenUDP opens a socket in a namespace; nil is the host.
func listenUDP(t testing.TB, ns *os.File, a netip.Addr) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	listen := func() (err error) {
		c, err = net.ListenUDP("udp", &net.UDPAddr{IP: a.AsSlice()})
		return err
	}
	if ns == nil {
		must(t, listen())
	} else {
		must(t, inNetns(ns, listen))
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func received(c *net.UDPConn, wait time.Duration) (netip.AddrPort, bool) {
	_ = c.SetReadDeadline(time.Now().Add(wait))
	_, from, err := c.ReadFromUDPAddrPort(make([]byte, 2048))
	return from, err == nil
}

// TestFirstPacketArrives: when Up returns, the very first packet of the
// sandbox gets out.
func TestFirstPacketArrives(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	sink := listenUDP(t, f.ns, f.addr4)
	for i := range uint32(50) {
		l := testLink(t, 1+i%3)
		_, err := m.Create(context.Background(), l)
		must(t, err)
		c, err := dialFrom(openNetns(t, m, l.ID), "udp", sink.LocalAddr().String(), time.Second)
		must(t, err)
		must(t, m.Up(l.ID))
		_, err = c.Write([]byte("first"))
		must(t, err)
		if _, ok := received(sink, 2*time.Second); !ok {
			t.Fatalf("start %d: the first packet was lost", i)
		}
		must(t, c.Close())
		must(t, m.Remove(l.ID))
	}
}

// TestOpenLeavesNoGap replaces the table again and again under a flood of
// unmarked packets. Not one may pass.
func TestOpenLeavesNoGap(t *testing.T) {
	m, f := open(t), newFar(t)
	l := launch(t, m, 1)
	sink := listenUDP(t, f.ns, f.addr4)
	c, err := dialFrom(openNetns(t, m, l.ID), "udp", sink.LocalAddr().String(), time.Second)
	must(t, err)
	stop, done := make(chan struct{}), make(chan struct{}) // closed by the test; by the flood
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = c.Write([]byte("unmarked"))
			}
		}
	}()
	before, _, err := m.SecondLayerDrops()
	must(t, err)
	for range 100 {
		again, err := Open(m.cfg)
		must(t, err)
		must(t, again.Close())
		now, _, err := m.SecondLayerDrops()
		must(t, err)
		if now < before {
			t.Fatalf("counter went from %d to %d when the rules were replaced", before, now)
		}
		before = now
	}
	close(stop)
	<-done
	_ = c.Close()
	if before == 0 {
		t.Error("the flood did not reach the second layer")
	}
	if _, ok := received(sink, 50*time.Millisecond); ok {
		t.Error("an unmarked packet passed while the table was replaced")
	}
}

// TestOpenReplacesForeignTable: a table of that name made by something else
// is made right.
func TestOpenReplacesForeignTable(t *testing.T) {
	m, f := open(t), newFar(t)
	must(t, m.Purge())
	must(t, m.Purge())
	c := &nftables.Conn{}
	table := c.AddTable(m.table())
	c.AddChain(&nftables.Chain{Name: "forward", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter})
	c.AddChain(&nftables.Chain{Name: "from_an_older_version", Table: table})
	must(t, c.Flush())
	again, err := Open(m.cfg)
	must(t, err)
	must(t, again.Close())
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	must(t, err)
	got := map[string]string{}
	for _, h := range chains {
		if got[h.Name] = ""; h.Hooknum != nil {
			got[h.Name] = fmt.Sprint(h.Type, " ", *h.Hooknum, " ", *h.Priority)
		}
	}
	want := map[string]string{"reached": "", "begun": "", "inbound": "", "prerouting": "filter 0 -300", "publish": "nat 0 -100", "input": "filter 1 0", "forward": "filter 2 0", "postrouting": "nat 4 100"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("chains (-want +got):\n%s", d)
	}
	l := launch(t, m, 1)
	to := serve(t, f.ns, net.JoinHostPort(f.addr4.String(), "0"))
	if got, err := ask(openNetns(t, m, l.ID), to, refused); err == nil {
		t.Errorf("unmarked traffic reached the far end as %s", got)
	}
}

// TestNextHolderInheritsNoFlow: an answer to a removed sandbox's flow does
// not reach the next sandbox of the slot.
func TestNextHolderInheritsNoFlow(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	for name, end := range map[string]func(Link){
		"removed": func(l Link) { must(t, m.Remove(l.ID)) },
		"gone while closed": func(l Link) {
			must(t, m.rt.do(deleteLink(m.HostName(l.ID))))
			again, err := Open(m.cfg)
			must(t, err)
			must(t, again.Close())
			must(t, removeNetnsFile(m.NetnsPath(l.ID)))
		},
	} {
		for _, far := range []netip.Addr{f.addr4, f.addr6} {
			sink := listenUDP(t, f.ns, far)
			l := launch(t, m, 1)
			c, err := dialFrom(openNetns(t, m, l.ID), "udp", sink.LocalAddr().String(), time.Second)
			must(t, err)
			_, err = c.Write([]byte("question"))
			must(t, err)
			from, ok := received(sink, 2*time.Second)
			if !ok {
				t.Fatal("the question did not arrive")
			}
			port := c.LocalAddr().(*net.UDPAddr).Port
			must(t, c.Close())
			end(l)

			l = launch(t, m, 1)
			var next *net.UDPConn
			addr := l.Addr4
			if far.Is6() {
				addr = l.Addr6
			}
			must(t, inNetns(openNetns(t, m, l.ID), func() (err error) {
				next, err = net.ListenUDP("udp", &net.UDPAddr{IP: addr.AsSlice(), Port: port})
				return err
			}))
			_, err = sink.WriteToUDPAddrPort([]byte("late answer"), from)
			must(t, err)
			if _, ok := received(next, refused); ok {
				t.Errorf("%s, %s: the next sandbox got the last one's answer", name, far)
			}
			must(t, next.Close())
			must(t, m.Remove(l.ID))
		}
	}
}

// TestLinkIsSilent: bringing a link up and using it sends no ARP and no
// neighbour discovery, from either end.
func TestLinkIsSilent(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	l := testLink(t, 1)
	index, err := m.Create(context.Background(), l)
	must(t, err)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
	must(t, err)
	t.Cleanup(func() { must(t, unix.Close(fd)) })
	must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: index}))
	must(t, m.Up(l.ID))
	for _, a := range []netip.Addr{f.addr4, f.addr6} {
		_, err := ask(openNetns(t, m, l.ID), serve(t, f.ns, net.JoinHostPort(a.String(), "0")), 5*time.Second)
		must(t, err)
	}
	time.Sleep(1200 * time.Millisecond) // router and multicast reports would come by now
	seen := 0
	buf := make([]byte, 2048)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.ENETDOWN) {
			continue // said once: the link was down when the capture began
		}
		if err != nil {
			break
		}
		seen++
		if why := noise(buf[:n]); why != "" {
			t.Errorf("%s on the link: % x", why, buf[:n])
		}
	}
	if seen == 0 {
		t.Error("the capture saw nothing at all")
	}
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// noise names a frame that is not TCP.
func noise(b []byte) string {
	if len(b) < 54 {
		return "short frame"
	}
	switch [2]byte(b[12:14]) {
	case [2]byte{8, 6}:
		return "ARP"
	case [2]byte{8, 0}:
		if b[23] != unix.IPPROTO_TCP {
			return "IPv4 that is not TCP"
		}
	case [2]byte{0x86, 0xdd}:
		if b[20] != unix.IPPROTO_TCP {
			return "IPv6 that is not TCP"
		}
	default:
		return "unknown protocol"
	}
	return ""
}
